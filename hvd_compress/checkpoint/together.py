"""Work on all ranks that ends alike: every rank goes on, or every rank raises the same error."""

from __future__ import annotations

from typing import Any, Callable, Optional, TypeVar

from hvd_compress.checkpoint.files import CheckpointError
from hvd_compress.comm.communicator import Communicator
from hvd_compress.engine.reducer import Reducer

T = TypeVar("T")
_KINDS = {kind.__name__: kind for kind in (ImportError, RuntimeError, TypeError, ValueError)}
_SHOWN = 4  # different failures in one message


def communicator_of(caller: str, optimizer: Any) -> Communicator:
    """Return the communicator of one of our optimizers.

    Raises:
        TypeError: if it is another optimizer.
        ValueError: if this rank is not in its process set.
    """
    reducer = getattr(optimizer, "_reducer", None)
    if not isinstance(reducer, Reducer):
        kind = type(optimizer)
        raise TypeError(
            f"{caller}: optimizer is a {kind.__module__}.{kind.__qualname__} and must be what "
            "hvd_compress.DistributedOptimizer has returned (not one of op=Adasum, which is Horovod's own)"
        )
    if not reducer.comm.member:
        raise ValueError(f"{caller}: this rank is not in the optimizer's process set; call it on its ranks only")
    return reducer.comm


def gather_results(comm: Communicator, name: str, work: Callable[[], Any]) -> list[Any]:
    """Run ``work`` on every rank and return what it has returned (JSON-like) on each; raise alike if it has failed.

    Args:
        comm: collectives of the ranks.
        name: a name for this collective.
        work: what to do; it must use no collective.

    Raises:
        CheckpointError: on every rank if ``work`` raises on any (ImportError, RuntimeError, TypeError and ValueError
            stay what they are); the message has each rank's.
    """
    result, failure, cause = None, None, None
    try:
        result = work()
    except Exception as error:
        failure, cause = [type(error).__name__, str(error)], error
    everyone = comm.gather_objects([failure, result], f"checkpoint.{name}")
    failures = [(rank, *failure) for rank, (failure, _) in enumerate(everyone) if failure is not None]
    if failures:
        raise _KINDS.get(failures[0][1], CheckpointError)(described(failures)) from cause
    return [result for _, result in everyone]


def together(comm: Communicator, name: str, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return this rank's result, of any kind; raise alike as ``gather_results`` does."""
    results: list[T] = []
    gather_results(comm, name, lambda: results.append(work()))
    return results[0]


def on_first_rank(comm: Communicator, name: str, work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0 and return its result (JSON-like) on every rank; raise alike if it fails."""
    return gather_results(comm, name, lambda: work() if comm.rank == 0 else None)[0]


def described(failures: list[tuple[int, str, str]]) -> str:
    """Return one text for the failures of several ranks, given as (rank, kind of error, message)."""
    ranks: dict[str, list[int]] = {}
    for rank, kind, text in failures:
        ranks.setdefault(text if kind in _KINDS or kind == "CheckpointError" else f"{kind}: {text}", []).append(rank)
    parts = [f"{text} (rank {', '.join(map(str, which))})" for text, which in ranks.items()]
    more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return "; ".join((*parts[:_SHOWN], *more))


def require_between_steps(caller: str, optimizer: Any) -> None:
    """Raise RuntimeError if a step of ``optimizer`` has begun: a checkpoint has no gradients."""
    if optimizer._reducer.tracker.busy:
        raise RuntimeError(
            f"{caller} between loss.backward() and optimizer.step(): gradients are in no checkpoint; call it after "
            "step()"
        )


def require_common(caller: str, everyone: list[dict[str, Any]]) -> None:
    """Raise ValueError unless all ranks have given the same values, by argument, to ``caller``."""
    for rank, other in enumerate(everyone):
        different: Optional[str] = next((key for key in other if other[key] != everyone[0][key]), None)
        if different is not None:
            raise ValueError(
                f"{caller}: rank 0 has {different}={everyone[0][different]!r} and rank {rank} has "
                f"{different}={other[different]!r}; give all ranks the same"
            )
