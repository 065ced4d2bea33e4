"""Loading: everything is checked, on all ranks, before anything is changed on any."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Union

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.checkpoint import directory as layout
from hvd_compress.checkpoint.background import finish_last
from hvd_compress.checkpoint.directory import Manifest
from hvd_compress.checkpoint.files import CheckpointError, read_state, safetensors_library
from hvd_compress.checkpoint.together import communicator_of, on_first_rank, require_between_steps, together
from hvd_compress.optimizer.merging import merge_states
from hvd_compress.optimizer.saved_state import KEY


class _Loaded(NamedTuple):
    """One rank's part of a checkpoint; the fields are the keys of a rank's file."""

    model: dict[str, Any]
    model_versions: dict[str, Any]
    optimizer: dict[str, Any]
    optimizer_class: str
    extra: Any


def load(directory: Union[str, Path], model: torch.nn.Module, optimizer: Any, *, step: Optional[int] = None) -> Any:
    """Restore a checkpoint that ``save`` has written (collective over the optimizer's ranks).

    With as many ranks as it was saved from, every rank gets back its own state, and training continues to the bit.
    With another number, what all ranks had not sent yet is shared out over the ranks that there are now, every rank
    starts at the model that they share, and rank j gets the buffers (statistics of batch normalisation) and the
    ``extra`` that rank ``j % P`` of the P saved ones had.

    Call it in place of broadcasts of the model or the optimizer's state, or after them.

    Args:
        directory: the directory given to ``save``.
        model: a model of the same architecture.
        optimizer: the distributed optimizer of this model, around an optimizer of the same class.
        step: number of the checkpoint; None: the one that was written last. Checkpoints that are not finished are
            ignored, with a warning.

    Returns:
        The ``extra`` that was given to ``save``, with tensors in host memory.

    Raises:
        CheckpointError: if there is no checkpoint; if a file is missing, truncated, altered, foreign or of a newer
            format, named with the rank that has read it and other checkpoints that could be loaded; or if the model or
            the optimizer does not fit.
        ValueError: if an argument is not allowed, or the optimizer's state cannot be loaded.
        TypeError: if the optimizer is not ours.
        RuntimeError: inside ``consensus()``, or between ``backward()`` and ``step()``.
        ImportError: without safetensors. All of these are raised on every rank alike, and nothing has changed.
    """
    comm = communicator_of("load", optimizer)
    root = Path(directory)
    with contextlib.suppress(CheckpointError):  # it has warned of its error
        finish_last(optimizer)

    def choose() -> Any:
        if step is not None:
            validation.integer("load", "step", step, 0)
        return layout.to_json(layout.choose(root, step))

    manifest = layout.from_json(on_first_rank(comm, "chosen", choose))
    path = layout.step_directory(root, manifest.step)

    def verify() -> _Loaded:
        optimizer._consensus.forbid("load")
        require_between_steps("load", optimizer)
        safetensors_library()
        try:
            loaded = _read(path, manifest, model, optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {layout.remedy(root, path)}") from error
        _require_fit(loaded, model, optimizer)
        return loaded

    loaded = together(comm, "verified", verify)
    together(comm, "restored", lambda: _restore(loaded, model, optimizer))
    return loaded.extra


def _read(path: Path, manifest: Manifest, model: torch.nn.Module, optimizer: Any) -> _Loaded:
    """Return this rank's part of a checkpoint of any number of ranks."""
    comm = optimizer._reducer.comm

    def read(rank: int) -> _Loaded:
        return _Loaded(**read_state(path, manifest.place(rank), manifest.files[rank]))

    if manifest.ranks == comm.size:
        return read(comm.rank)
    own: list[_Loaded] = []

    def states() -> Iterator[dict[str, Any]]:
        for rank in range(manifest.ranks):
            loaded = read(rank)
            if rank == comm.rank % manifest.ranks:
                own.append(loaded._replace(optimizer={}))
            yield loaded.optimizer

    merged = merge_states(states())
    shared = _shared_parameters(merged, model, optimizer)
    return own[0]._replace(optimizer=merged, model={**own[0].model, **shared})


def _shared_parameters(merged: Mapping[str, Any], model: torch.nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return, by the model's names, the parameters that all ranks start with, if the saved ones had their own points.

    A saved rank's own point is none of the merged state; the model that ranks share is.
    """
    points: dict[str, Tensor] = {}
    for bucket in merged.get(KEY, {}).get("buckets", ()):
        buffers = bucket["state"]["buffers"]
        points.update(zip(bucket["names"], buffers.get("shared", buffers.get("local", ()))))
    names = optimizer._parameter_names
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: points[names[p]].to(p.dtype) for name, p in parameters if names.get(p) in points}


def _require_fit(loaded: _Loaded, model: torch.nn.Module, optimizer: Any) -> None:
    """Raise CheckpointError or ValueError if the model or the optimizer differs from the saved one."""
    saved, here = _kinds(loaded.model), _kinds(model.state_dict())
    different = [name for name in {**here, **saved} if saved.get(name) != here.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"load: the checkpoint is of another model: {name!r} is {saved.get(name, 'missing')} in the checkpoint and "
            f"{here.get(name, 'missing')} here ({len(different)} such differences)"
        )
    _require_same(loaded.optimizer_class, optimizer._hvd_base.__name__, "the class of the optimizer")
    groups = [len(group["params"]) for group in loaded.optimizer["param_groups"]]
    groups_here = [len(group["params"]) for group in optimizer.param_groups]
    _require_same(groups, groups_here, "the number of parameters in each group")
    optimizer._checkpoint.require_readable(loaded.optimizer)


def _kinds(state: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of the tensors in a model's state by name; "other" for what else it holds."""
    return {
        name: f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "other"
        for name, value in state.items()
    }


def _require_same(saved: Any, here: Any, what: str) -> None:
    if saved != here:
        raise CheckpointError(f"load: {what} is {saved} in the checkpoint and {here} here; build the same on all ranks")


def _restore(loaded: _Loaded, model: torch.nn.Module, optimizer: Any) -> None:
    """Change the model and the optimizer."""
    weights: OrderedDict[str, Any] = OrderedDict(loaded.model)
    weights._metadata = OrderedDict(loaded.model_versions)  # type: ignore[attr-defined]
    model.load_state_dict(weights)
    optimizer.load_state_dict(loaded.optimizer)
