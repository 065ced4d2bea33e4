"""The interface of an exchange: how the payload of one bucket travels and comes back as an aggregate over ranks."""

from __future__ import annotations

import abc
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Average, Communicator, Reduction
from hvd_compress.compressors.layout import pieces


def _stateless(parameter: Parameter) -> dict[str, Any]:
    return {}


class Context(NamedTuple):
    """Access of a bucket's state and exchange to the optimizer.

    Attributes:
        comm: collectives of the optimizer's process set.
        reduction: op and predivide factor of the aggregate.
        optimizer_state: returns the wrapped optimizer's state of a parameter, as it is now (may be empty).
    """

    comm: Communicator
    reduction: Reduction = Reduction()
    optimizer_state: Callable[[Parameter], dict[str, Any]] = _stateless

    @property
    def sum_factor(self) -> int:
        """Factor from a mean over ranks to the aggregate: 1 for Average, the number of ranks for Sum."""
        return 1 if self.reduction.op == Average else self.comm.size


def require_countable(bucket: Bucket, what: str, count: int) -> None:
    """Raise ValueError if a collective would bring together more than Horovod, which has 32 bits, can count.

    Args:
        count: elements that are summed, or bytes that are gathered from all ranks.
    """
    if count >= 2**31:
        raise ValueError(
            f"the {what} of parameters {bucket.layout.names[0]!r} to {bucket.layout.names[-1]!r} would bring together "
            f"{count} elements or bytes on each rank, and Horovod counts to {2**31 - 1}; choose a smaller density, or "
            "a compressor whose payloads are summed, such as RandomBlock"
        )


class Exchange(abc.ABC):
    """The exchange of one bucket: every rank sends a payload, every rank gets the aggregate.

    A step calls ``set_step``, ``encode``, ``launch``, ``next_round``, ``wait``, and then ``subtract_sent`` and
    ``add_aggregate`` (or ``write_aggregate``). Until ``wait`` has returned nothing has changed but buffers of the
    exchange itself, so that a failed collective loses nothing. What the exchange remembers from step to step changes
    in ``commit`` only: a step that is given up leaves it as it was.

    Args:
        name: start of the names of its collectives; by default the bucket's name.
    """

    def __init__(self, bucket: Bucket, context: Context, name: str = "") -> None:
        self.bucket, self.context = bucket, context
        self.name = name or bucket.name
        self._aggregate: Optional[Tensor] = None

    def set_step(self, step: int) -> None:  # noqa: B027
        """Draw what step ``step`` needs; host work only."""

    @abc.abstractmethod
    def encode(self, flat: Tensor) -> None:
        """Form this rank's payload of ``flat``, which must not change until ``wait`` has returned."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Start to send the payload."""

    def next_round(self) -> None:  # noqa: B027
        """Take what has arrived and send what depends on it; called once all buckets have been launched."""

    @abc.abstractmethod
    def wait(self) -> None:
        """Wait until the aggregate has arrived.

        Raises:
            HorovodInternalError: if a peer has failed.
        """

    def drain(self) -> None:
        """Wait for what has been launched, on all ranks, and make no use of it."""
        self.next_round()
        self.wait()

    @abc.abstractmethod
    def subtract_sent(self, residual: Tensor) -> None:
        """Subtract what this rank has sent from ``residual``."""

    @abc.abstractmethod
    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        """Add ``alpha`` times the aggregate to ``target``; the same bits on every rank."""

    def write_aggregate(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Write ``scale`` times the aggregate into the bucket's flattened tensors, which hold zeros."""
        layout = self.bucket.layout
        if self._aggregate is None:
            self._aggregate = torch.zeros(layout.total, dtype=self.bucket.state_dtype, device=self.bucket.device)
        else:
            self._aggregate.zero_()
        self.add_aggregate(self._aggregate, scale)
        torch._foreach_copy_(list(tensors), list(pieces(self._aggregate, layout.numels)))

    def commit(self) -> None:  # noqa: B027
        """Let what this exchange has changed count from now on: the step is taken."""

    def clear(self, flat: Tensor) -> None:
        """Set the coordinates that this rank has sent to zero in ``flat`` (compressors that select coordinates)."""
        raise NotImplementedError(f"{type(self).__name__} does not know which coordinates were sent")

    def reset(self) -> None:  # noqa: B027
        """Forget what it remembers from step to step."""

    def warm_start(self) -> dict[str, FlatBuffer]:
        """Return what the compressor carries from step to step, the same on every rank, by kind."""
        return {}

    # -- exchanges with a server that compresses the aggregate again and keeps an error of its own ---------------

    def server_error(self) -> Optional[FlatBuffer]:
        """Return the error that this rank keeps as the server of its shard, or None if there is no server."""
        return None

    def server_pending(self) -> Optional[Tensor]:
        """Return a new flat vector whose mean over ranks is what the servers have not sent yet, or None.

        Of parameters that rest (``hold``) there is nothing in it.
        """
        return None

    def rescale_server_error(self, factor: float) -> None:  # noqa: B027
        """Let the server's error count ``factor`` times at this step, for which ``set_step`` has been called."""

    def hold(self, inactive: frozenset[int]) -> None:  # noqa: B027
        """Let the server's error of the parameters with these indices wait until they are not among them any more."""

    def clear_server_error(self) -> None:  # noqa: B027
        """Set the server's error to zero, but for parameters that rest."""

    def reshard(self) -> Optional[Tensor]:
        """Cut new shards if the number of ranks has changed (elastic jobs).

        Returns:
            This rank's former server error, as a flat vector for it to add to its own residual; None if there is none.
        """
        return None

    def at(self, step: int) -> Exchange:
        """Return the exchange of ``step``: this one, as a schedule of one stage."""
        return self
