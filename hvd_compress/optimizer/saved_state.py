"""The layout of what an optimizer saves under "hvd_compress", and what it says of each parameter."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import SavedParameter
from hvd_compress.algorithms.residual_update import detached_point

KEY = "hvd_compress"
FORMAT = 3


def find_bucket(identity: Mapping[str, Any], buckets: Sequence[Mapping[str, Any]]) -> Optional[Mapping[str, Any]]:
    """Return the saved bucket of this algorithm and these parameters, or None."""
    return next((bucket for bucket in buckets if all(bucket[k] == v for k, v in identity.items())), None)


def with_numbers(bucket: Mapping[str, Any], brought: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a bucket with the numbers that a broadcast has brought for it."""
    found = find_bucket({"algorithm": bucket["algorithm"], "names": bucket["names"]}, brought)
    return dict(bucket) if found is None else {**bucket, "state": {**bucket["state"], **found["state"]}}


def numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a bucket's numbers, which are the same on every rank, without its buffers."""
    return {k: v for k, v in state.items() if k not in ("buffers", "begins")}


def parts_of(bucket: Mapping[str, Any], ranks: int) -> dict[str, SavedParameter]:
    """Return what a saved bucket says of each of its parameters, whatever algorithm it was saved from.

    Args:
        ranks: number of ranks now; a server's error, of which there was one, joins one of so many residuals.
    """
    state = bucket["state"]
    buffers: Mapping[str, Sequence[Tensor]] = state["buffers"]
    of_updates = "shared" in buffers
    found = {}
    for index, name in enumerate(bucket["names"]):
        views = {kind: buffer[index] for kind, buffer in buffers.items()}
        pending: Optional[Tensor] = None
        for kind in ("residual", "carried"):
            if kind in views:
                pending = views[kind].clone() if pending is None else pending.add_(views[kind])
        if "server" in views:
            if pending is None:
                pending = torch.zeros_like(views["local"], dtype=views["server"].dtype)
            begin, error = state["begins"][index], views["server"]
            # Shards are cut along the order of memory.
            in_memory = pending.as_strided((pending.numel(),), (1,))
            in_memory[begin : begin + error.numel()].add_(error, alpha=ranks)
        shared, local = views.get("shared"), views.get("local")
        resting = index in state.get("resting", ())  # then what its point has moved is in the residual already
        coefficient = state["resting"][index] if resting else state.get("local_coefficient", 0.0)
        if of_updates and shared is not None and pending is not None:
            placed = torch.empty_like(shared, dtype=shared.dtype if local is None else local.dtype)
            detached_point(shared, views["residual"], coefficient, placed)
            if local is None:
                local = placed
            elif not resting:
                pending.add_(placed.to(pending.dtype).sub_(local))
        found[name] = SavedParameter(
            pending,
            1.0 if of_updates else state.get("residual_lr"),
            shared,
            local,
            coefficient,
            state.get("largest_lr", 0.0),
            tuple(state["known"][index]) if "known" in state else (),
        )
    return found
