"""Compressors that send every element: as it is (Identity), or in a smaller dtype (Cast)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Sequence

import torch
from torch import Tensor

from hvd_compress.compressors.base import Compressor, Layout, Payload, SummableCodec, pieces


@dataclass(frozen=True)
class Identity(Compressor):
    """Send everything unchanged: turns every algorithm into plain data-parallel training."""

    lossless: ClassVar[bool] = True

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """All elements, in the tensor's dtype."""
        return Payload(tensor.reshape(-1).clone(), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """The tensor itself."""
        return payload.values.to(payload.dtype).view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return IdentityCodec(layout, dtype)


@dataclass(frozen=True)
class Cast(Compressor):
    """Send every element as ``dtype``; values beyond its range are sent as its largest finite value,
    infinities as nan.

    Where payloads of P ranks are summed in float16 (EF, DEF), the largest value is 2^15 / P, so that the sum
    stays in range; error feedback keeps the rest.

    Args:
        dtype: torch.float16 or torch.float32, the floating-point types below float64 that Horovod can
            sum. (It has no bfloat16; parameters and gradients in bfloat16 are sent as float32 or through
            ``Cast(torch.float16)``.)

    Raises:
        ValueError: for any other dtype.
    """

    lossless: ClassVar[bool] = True
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(
                f"Cast: dtype={self.dtype!r} is not allowed; it must be torch.float16 or torch.float32, "
                "which Horovod can sum"
            )

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """All elements, saturated and rounded to ``dtype``."""
        values = torch.empty(tensor.numel(), dtype=self.dtype, device=tensor.device)
        _saturating_copy(tensor.reshape(-1), values)
        return Payload(values, tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """The rounded tensor in its original dtype."""
        return payload.values.to(payload.dtype).view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return IdentityCodec(layout, self.dtype)


def _saturating_copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
    limit = torch.finfo(target.dtype).max
    if limit < torch.finfo(source.dtype).max:
        target.clamp_(-limit, limit)
        # An infinity is no number to be paid off bit by bit: it must show.
        target.masked_fill_(source.isfinite().logical_not_(), math.nan)


class IdentityCodec(SummableCodec):
    """Every coordinate in its place; the payload differs from the flat vector by its dtype at most."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.numel = layout.total
        self.dtype = dtype
        self._numels = layout.numels

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        _saturating_copy(flat, payload)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        flat.add_(payload, alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        if payload.dtype == flat.dtype:
            flat.zero_()
            return
        self.accumulate(payload, flat, -1.0)
        flat.nan_to_num_(0.0, 0.0, 0.0)  # what was sent has left, whatever it was

    def write(self, payload: Tensor, flat: Tensor) -> None:
        flat.copy_(payload)

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        flat.zero_()

    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(tensors), list(pieces(payload, self._numels)))
