"""Compressors that send every element: unchanged (Identity), or in a smaller dtype (Cast)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from hvd_compress.compressors.base import Compressor, SummableCodec
from hvd_compress.compressors.layout import Layout, pieces


@dataclass(frozen=True)
class Identity(Compressor):
    """Compressor that sends everything unchanged, which turns every algorithm into plain data-parallel training."""

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return IdentityCodec(layout, dtype)


@dataclass(frozen=True)
class Cast(Compressor):
    """Compressor that sends every element as ``dtype``.

    Values beyond its range are sent as its largest finite value, infinities as nan.

    Where payloads of P ranks are summed in float16 (EF, DEF), the largest value is 2^15 / P, so that the sum
    stays in range; the difference remains in the residual.

    Args:
        dtype: torch.float16 or torch.float32, the floating-point types below float64 that Horovod can
            sum. (It has no bfloat16; parameters and gradients in bfloat16 are sent as float32 or through
            ``Cast(torch.float16)``.)

    Raises:
        ValueError: for any other dtype.
    """

    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(
                f"Cast: dtype={self.dtype!r} is not allowed; it must be torch.float16 or torch.float32, "
                "which Horovod can sum"
            )

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return IdentityCodec(layout, self.dtype)


class IdentityCodec(SummableCodec):
    """A codec that sends every coordinate in its place, in the dtype of the flat vector or another."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.numel = layout.total
        self.dtype = dtype
        self._numels = layout.numels

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        payload.copy_(flat)
        limit = torch.finfo(payload.dtype).max
        if limit < torch.finfo(flat.dtype).max:
            payload.clamp_(-limit, limit)
            # Error feedback could never send all of an infinity, so training should fail visibly.
            payload.masked_fill_(flat.isfinite().logical_not_(), math.nan)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        flat.add_(payload, alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        if payload.dtype == flat.dtype:
            flat.zero_()
            return
        self.accumulate(payload, flat, -1.0)
        flat.nan_to_num_(0.0, 0.0, 0.0)  # values that are not finite have been sent as nan and must not remain

    def write(self, payload: Tensor, flat: Tensor) -> None:
        flat.copy_(payload)

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        flat.zero_()

    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(tensors), list(pieces(payload, self._numels)))
