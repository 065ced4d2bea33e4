"""Checks of a state that is to be loaded; each failure is a ValueError that says what is wrong with it."""

from __future__ import annotations

import reprlib
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import State
from hvd_compress.optimizer.saved_state import FORMAT, KEY

_NUMBERS = ("format", "size", "step", "local_steps_done")
# Older states of the same format do not say.
_OPTIONAL = {"largest_lr", "dtype", "resting"}


def require_readable(state: Any, member: bool, rank: int) -> None:
    """Raise ValueError unless ``state`` is what ``state_dict()`` of an optimizer returns, ours or a plain torch one.

    Args:
        member: whether this rank takes part in training; what is ours matters to no other.
        rank: this rank, for the message.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise ValueError(
            f"load_state_dict: state_dict={reprlib.repr(state)} is not allowed (rank {rank}); it must be what "
            "optimizer.state_dict() returns, a dict with 'state' and 'param_groups'"
        )
    if not member or (ours := state.get(KEY)) is None:
        return
    if isinstance(ours, Mapping) and ours.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"load_state_dict: the state has format {ours['format']!r} of hvd_compress, and this version reads "
            f"{FORMAT} (rank {rank}). Load it with the version that wrote it, call optimizer.flush() on all "
            f"ranks, and save the model and the state without its entry {KEY!r}"
        )
    try:
        _require_section(ours)
    except ValueError as error:
        raise ValueError(
            f"load_state_dict: the entry {KEY!r} of the state is damaged (rank {rank}): {error}. Load another "
            "checkpoint, or delete this entry to begin with empty residuals"
        ) from error


def require_fitting(states: Sequence[State], buckets: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a parameter has another shape in the saved buckets than in ``states``."""
    shapes = {n: p.shape for state in states for n, p in zip(state.bucket.layout.names, state.bucket.parameters)}
    for bucket in buckets:
        for kind in {"shared", "local", "residual", "carried"} & set(bucket["state"]["buffers"]):
            for name, view in zip(bucket["names"], bucket["state"]["buffers"][kind]):
                _require_shape(kind, name, view, shapes.get(name, view.shape))


def require_same_kinds(state: State, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless the saved state of a bucket, of the same algorithm, has all that ``state`` would save."""
    own, first = state.state_dict(), state.bucket.layout.names[0]
    for key in own:
        if key not in saved and key not in _OPTIONAL:
            raise ValueError(f"load_state_dict: the saved state of parameter {first!r} and others has no {key!r}")
    for kind, views in saved["buffers"].items():
        # What a former shard has left, and points within local steps, are saved only where there are any.
        if kind not in own["buffers"] and kind not in ("carried", "local"):
            raise ValueError(f"load_state_dict: unknown buffers {kind!r} of parameter {first!r} in the saved state")
        for name, view, here in zip(state.bucket.layout.names, views, own["buffers"].get(kind, ())):
            _require_shape(kind, name, view, here.shape)


def _require_shape(kind: str, name: str, view: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless a saved tensor has the shape that it has here."""
    if view.shape != shape:
        raise ValueError(
            f"load_state_dict: {kind} of parameter {name!r} has shape {tuple(view.shape)} in the saved state and "
            f"{tuple(shape)} here; load a state of the same model"
        )


def _require_section(ours: Any) -> None:
    """Raise ValueError unless the entry is built as this version saves it."""
    _require("it", ours, Mapping)
    if ours.get("rank", 0) is not None:  # as in states of all ranks, merged
        _require("'owner'", ours.get("owner"), str)
        _require("'rank'", ours.get("rank"), int)
    for key in _NUMBERS:
        _require(repr(key), ours.get(key), int)
    _require("'buckets'", ours.get("buckets"), (list, tuple))
    for index, bucket in enumerate(ours["buckets"]):
        where = f"buckets[{index}]"
        _require(where, bucket, Mapping)
        _require(f"{where}['algorithm']", bucket.get("algorithm"), str)
        _require(f"{where}['names']", bucket.get("names"), (list, tuple))
        _require(f"{where}['state']", bucket.get("state"), Mapping)
        _require_buffers(where, bucket["names"], bucket["state"])


def _require_buffers(where: str, names: Sequence[str], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless every kind of buffer has a tensor of floating-point numbers for each parameter."""
    _require(f"{where}['buffers']", state.get("buffers"), Mapping)
    for kind, views in state["buffers"].items():
        _require(f"{where}[{kind!r}]", views, (list, tuple))
        if len(views) != len(names):
            raise ValueError(f"{where}[{kind!r}] has {len(views)} tensors for {len(names)} parameters")
        for name, view in zip(names, views):
            _require(f"{kind} of parameter {name!r}", view, Tensor)
            if not view.is_floating_point():
                raise ValueError(f"{kind} of parameter {name!r} has dtype {view.dtype}")
    if "server" in state["buffers"] and len(state.get("begins", ())) != len(names):
        raise ValueError(f"{where}['begins'] has not a number for each of {len(names)} parameters")


def _require(what: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is missing" if value is None else f"{what} is {reprlib.repr(value)}")
