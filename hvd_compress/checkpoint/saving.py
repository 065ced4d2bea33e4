"""Saving: every rank writes its own file, and the checkpoint counts once all of them are on the disk."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any, Literal, Optional, Union, overload

import torch

from hvd_compress import validation
from hvd_compress.checkpoint import directory as layout
from hvd_compress.checkpoint.background import FileAgreement, PendingSave, finish_last, remember
from hvd_compress.checkpoint.directory import Manifest
from hvd_compress.checkpoint.files import (
    CheckpointError,
    FileRecord,
    Place,
    copy_to_host,
    dtype_names,
    write_state,
    written_at_once,
)
from hvd_compress.checkpoint.structure import FlatState, flatten
from hvd_compress.checkpoint.together import (
    communicator_of,
    gather_results,
    on_first_rank,
    require_between_steps,
    require_common,
    together,
)
from hvd_compress.comm.communicator import Communicator

# Seconds that a rank looks for a file that rank 0 has made: network file systems may show it late.
_PATIENCE = 15.0


@overload
def save(
    directory: Union[str, Path],
    model: torch.nn.Module,
    optimizer: Any,
    *,
    extra: Any = ...,
    step: Optional[int] = ...,
    keep: int = ...,
    asynchronous: Literal[False] = ...,
    timeout: float = ...,
) -> Path: ...


@overload
def save(
    directory: Union[str, Path],
    model: torch.nn.Module,
    optimizer: Any,
    *,
    extra: Any = ...,
    step: Optional[int] = ...,
    keep: int = ...,
    asynchronous: Literal[True],
    timeout: float = ...,
) -> PendingSave: ...


@overload
def save(
    directory: Union[str, Path],
    model: torch.nn.Module,
    optimizer: Any,
    *,
    extra: Any = ...,
    step: Optional[int] = ...,
    keep: int = ...,
    asynchronous: bool,
    timeout: float = ...,
) -> Union[Path, PendingSave]: ...


def save(
    directory: Union[str, Path],
    model: torch.nn.Module,
    optimizer: Any,
    *,
    extra: Any = None,
    step: Optional[int] = None,
    keep: int = 3,
    asynchronous: bool = False,
    timeout: float = 1800.0,
) -> Union[Path, PendingSave]:
    """Save a checkpoint of all ranks, from which training continues to the bit (collective over the optimizer's ranks).

    Every rank writes the model as it has it (parameters may differ between ranks, and statistics of batch normalisation
    do), ``optimizer.state_dict()`` with its residual, and ``extra``, into a safetensors file of its own. The checkpoint
    is ``directory/step-NNNNNNNN``, and counts once all these files are on the disk: killed at any moment, a job
    resumes from the last whole one. Gradients are not saved: call this between steps.

    Args:
        directory: directory of this optimizer's checkpoints, on a file system that all ranks share; made if missing.
        model: the model that is trained.
        optimizer: what ``hvd_compress.DistributedOptimizer`` has returned for it.
        extra: what else this rank needs (states of scheduler, ``GradScaler``, sampler and random generators, epoch):
            None, bool, int, float, str, dense tensors, and dicts, lists and tuples of them.
        step: number of the checkpoint; a checkpoint with this number is replaced. None: the number of exchanges so far.
        keep: number of whole checkpoints to keep, the ones that were written last; older ones are removed once the new
            one is whole.
        asynchronous: copy all tensors to host memory, and write them while training goes on.
        timeout: seconds that ranks wait for one another while they write asynchronously.

    Returns:
        The path of the checkpoint; with ``asynchronous`` a handle whose ``wait()`` returns it. The next save and the
        end of the process wait for it, too.

    Raises:
        TypeError: if ``extra`` or a state holds anything else, with the path to it, before anything is written.
        ValueError: if an argument is not allowed, or ranks disagree on it.
        RuntimeError: between ``backward()`` and ``step()``.
        ImportError: without safetensors.
        CheckpointError: if a rank could not write, the directory is not shared, or the previous asynchronous save has
            failed. All of these are raised on every rank alike, and earlier checkpoints are as they were.
    """
    comm = communicator_of("save", optimizer)
    root = Path(directory)
    number = optimizer._reducer.step if step is None else step
    state = FlatState("", {})

    def prepare() -> dict[str, Any]:
        nonlocal state
        finish_last(optimizer)
        _check_arguments(step, keep, asynchronous, timeout)
        require_between_steps("save", optimizer)
        state = flatten(_full_state(model, optimizer, extra), dtype_names())
        return {"step": int(number), "keep": int(keep), "asynchronous": asynchronous}

    require_common("save", gather_results(comm, "prepare", prepare))
    number = int(number)
    token = on_first_rank(comm, "open", lambda: _open(root, number))
    place = Place(number, comm.rank, comm.size, token)
    path = layout.step_directory(root, number)

    def begin() -> FlatState:
        _require_shared(path / _marker(token))
        return copy_to_host(state) if asynchronous else state

    ready = together(comm, "begin", begin)
    if not asynchronous:
        _write_now(comm, root, place, ready, keep)
        return path
    agreement = FileAgreement(root, place, keep, timeout)
    pending = PendingSave(path, lambda: agreement.conclude(lambda: write_state(path, place, ready)))
    remember(optimizer, pending)
    return pending


def _check_arguments(step: Any, keep: Any, asynchronous: Any, timeout: Any) -> None:
    if step is not None:
        validation.integer("save", "step", step, 0)
    validation.integer("save", "keep", keep, 1)
    validation.boolean("save", "asynchronous", asynchronous)
    validation.positive("save", "timeout", timeout)


def _full_state(model: torch.nn.Module, optimizer: Any, extra: Any) -> dict[str, Any]:
    """Return all that a rank's file holds."""
    weights = model.state_dict()
    return {
        "model": dict(weights),
        "model_versions": {name: dict(about) for name, about in getattr(weights, "_metadata", {}).items()},
        "optimizer": optimizer.state_dict(),
        "optimizer_class": optimizer._hvd_base.__name__,
        "extra": extra,
    }


def _marker(token: str) -> str:
    return f"began.{token}.json"


def _open(root: Path, step: int) -> str:
    """Make the checkpoint's directory, with a file by which other ranks know it, and return the attempt's token."""
    token = secrets.token_hex(4)
    path = layout.step_directory(root, step)
    root.mkdir(parents=True, exist_ok=True)
    layout.remove_leftovers(root)
    path.mkdir(exist_ok=True)
    with written_at_once(path / _marker(token)):
        pass
    return token


def _require_shared(marker: Path) -> None:
    """Raise CheckpointError if this rank does not see the file that rank 0 has made."""
    deadline = time.monotonic() + _PATIENCE
    while not marker.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"save: {marker}, which rank 0 has written, is not seen here: the directory must be on a file system "
                "that all ranks share"
            )
        time.sleep(0.1)


def _write_now(comm: Communicator, root: Path, place: Place, state: FlatState, keep: int) -> None:
    """Write this rank's file, and let rank 0 make the checkpoint whole once all ranks have written theirs."""
    path = layout.step_directory(root, place.step)
    records = gather_results(comm, "written", lambda: list(write_state(path, place, state)))
    manifest = Manifest(place.step, place.token, 0, [FileRecord(*record) for record in records])
    on_first_rank(comm, "published", lambda: layout.publish(root, manifest, keep))
