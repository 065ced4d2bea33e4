"""Numbers that are none: infinities and nan in vectors, found and taken out, on CPUs and accelerators."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from hvd_compress import native, validation

POLICIES = ("propagate", "raise", "skip")


def require_policy(owner: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a value of the argument ``nonfinite``."""
    validation.one_of(owner, "nonfinite", value, POLICIES)


def all_finite(values: Tensor) -> bool:
    """Return whether no element is an infinity or nan (waits for a device)."""
    if values.numel() == 0:
        return True
    if native.applies(values):
        return native.all_finite(values)
    # The largest magnitude cannot overflow, and is nan if any element is.
    return bool(torch.isfinite(torch.linalg.vector_norm(values, float("inf"))))


def nonfinite_flags(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each tensor 1.0 if it holds an infinity or nan, else 0.0 (float32, on its device, without waiting)."""
    if not tensors:
        return torch.zeros(0, device="cpu")
    if tensors[0].device.type == "cpu":
        return torch.tensor([float(not all_finite(t)) for t in tensors], dtype=torch.float32, device="cpu")
    norms = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], float("inf"))
    return torch.isfinite(torch.stack(norms)).logical_not().to(torch.float32)


def take_out(flat: Tensor, views: Sequence[Tensor]) -> Tensor:
    """Put zeros in place of infinities and nan, and return ``nonfinite_flags`` of what was there.

    Args:
        flat: the vector behind ``views``, which are not empty together if it is not.
    """
    if flat.device.type == "cpu" and all_finite(flat):
        return torch.zeros(len(views), dtype=torch.float32, device="cpu")
    flags = nonfinite_flags(views)
    torch.nan_to_num_(flat, 0.0, 0.0, 0.0)
    return flags


def poison(tensors: Sequence[Tensor], flags: Tensor) -> None:
    """Put nan into the tensors whose flag is not zero: into all of it on a CPU, elsewhere into its first element.

    A device is not waited for; to write whole tensors there would cost a pass over all of them at every step.

    Args:
        tensors: of one dtype.
    """
    if flags.device.type == "cpu":
        for index in flags.nonzero().flatten().tolist():
            tensors[index].fill_(float("nan"))
    elif tensors:
        marks = torch.where(flags != 0, float("nan"), 0.0).to(tensors[0].dtype).split(1)
        heads = [(tensor.as_strided((1,), (1,)), mark) for tensor, mark in zip(tensors, marks) if tensor.numel()]
        if heads:
            torch._foreach_add_([head for head, _ in heads], [mark for _, mark in heads])
