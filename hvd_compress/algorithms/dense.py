"""Plain data-parallel training through our own pipeline: the baseline everything is compared with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.states import GradientState, Rate
from hvd_compress.buckets import Bucket, Mirror
from hvd_compress.compressors import Cast, Compressor, Identity
from hvd_compress.exchange import Context, Ring


@dataclass(frozen=True)
class Dense(Algorithm):
    """Average gradients in contiguous buckets, nothing compressed, nothing remembered.

    Args:
        wire: ``Identity()``, or ``Cast(torch.float16)`` for what Horovod calls ``Compression.fp16``. Nothing
            keeps what the cast loses, so a value beyond its range becomes an infinity that can be seen.

    Raises:
        ValueError: if ``wire`` is another compressor: it would lose what it does not send.
    """

    wire: Compressor = field(default_factory=Identity)

    def __post_init__(self) -> None:
        if not isinstance(self.wire, (Identity, Cast)):
            raise ValueError(
                f"Dense: wire={self.wire!r} is not allowed; it must be Identity() or Cast(...). "
                "Lossy compressors need error feedback: use EF(...) or DEF(...)"
            )

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _DenseState(self, bucket, context)


class _DenseState(GradientState):
    """Gradients are copied into (or already live in) ``out``, which is reduced in place."""

    delays = False

    def __init__(self, config: Dense, bucket: Bucket, context: Context) -> None:
        self.bucket, self._context = bucket, context
        self.out = bucket.mirror(bucket.dtype)
        # Horovod cannot sum bfloat16; other dtypes travel as they are unless a Cast narrows them.
        wire_dtype = torch.float32 if bucket.dtype == torch.bfloat16 else bucket.dtype
        if isinstance(config.wire, Cast) and config.wire.dtype.itemsize < wire_dtype.itemsize:
            wire_dtype = config.wire.dtype
        self._wire = self.out.flat if wire_dtype == bucket.dtype else torch.zeros_like(self.out.flat, dtype=wire_dtype)
        self._ring = Ring(self._wire, "dense", bucket, context)
        self._absorbed: set[int] = set()

    def absorb(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        view = self.out.views[index]
        self._absorbed.add(index)
        if gradient.data_ptr() == view.data_ptr():
            return gradient
        view.copy_(gradient)
        return view.detach()

    def abandon(self) -> None:
        self._absorbed.clear()

    def cancel(self) -> None:
        self._ring.wait()

    def buffers(self) -> dict[str, Mirror]:
        return {}

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        begin = time.perf_counter()
        targets, sources, missing = [], [], []
        for index, (view, gradient) in enumerate(zip(self.out.views, gradients)):
            if index in self._absorbed:
                continue
            if gradient is None:
                missing.append(view)
            elif gradient.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(gradient)
        self._absorbed.clear()
        if missing:
            torch._foreach_zero_(missing)
        if targets:
            torch._foreach_copy_(targets, sources)
        if self._wire is not self.out.flat:
            self._wire.copy_(self.out.flat)
        self._ring.launch()
        self._context.recorder.encode_seconds(time.perf_counter() - begin)

    def finish(self) -> list[Tensor]:
        begin = time.perf_counter()
        self._ring.wait()
        waited = time.perf_counter()
        if self._wire is not self.out.flat:
            self.out.flat.copy_(self._wire)
        self._context.recorder.wait_seconds(waited - begin)
        self._context.recorder.decode_seconds(time.perf_counter() - waited)
        return [view.detach() for view in self.out.views]  # whose memory the user may exchange: p.grad.data = ...
