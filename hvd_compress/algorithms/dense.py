"""Plain data-parallel training through our own pipeline: the baseline everything is compared with."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.bucket_state import GradientState, Rate
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors import Cast, Compressor, Identity
from hvd_compress.exchange import Context, FlatAllreduce


@dataclass(frozen=True, init=False)
class Dense(Algorithm):
    """Average gradients in contiguous buckets, nothing compressed, nothing remembered.

    Args:
        compressor: ``Identity()``, or ``Cast(torch.float16)`` for what Horovod calls ``Compression.fp16``. Nothing
            keeps what the cast loses, so a value beyond its range becomes an infinity that can be seen.
        wire: deprecated name of ``compressor``.

    Raises:
        ValueError: if ``compressor`` is another compressor: it would lose what it does not send.
    """

    compressor: Compressor = Identity()  # noqa: RUF009 - frozen

    def __init__(
        self,
        compressor: Compressor = Identity(),  # noqa: B008 - frozen
        *,
        wire: Optional[Compressor] = None,
    ) -> None:
        if wire is not None:
            warnings.warn("Dense(wire=...) is now Dense(compressor=...)", DeprecationWarning, stacklevel=2)
            compressor = wire
        if not isinstance(compressor, (Identity, Cast)):
            raise ValueError(
                f"Dense: compressor={compressor!r} is not allowed; it must be Identity() or Cast(...). "
                "Lossy compressors need error feedback: use EF(...) or DEF(...)"
            )
        object.__setattr__(self, "compressor", compressor)

    @property
    def wire(self) -> Compressor:
        """Return ``compressor`` by its deprecated name."""
        warnings.warn("Dense.wire is now Dense.compressor", DeprecationWarning, stacklevel=2)
        return self.compressor

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _DenseState(self, bucket, context)


class _DenseState(GradientState):
    """Gradients are copied into (or already live in) ``out``, which is reduced in place."""

    delays = False

    def __init__(self, config: Dense, bucket: Bucket, context: Context) -> None:
        self.bucket, self._context = bucket, context
        self.out = bucket.flat_buffer(bucket.dtype)
        # Horovod cannot sum bfloat16; other dtypes travel as they are unless a Cast narrows them.
        wire_dtype = torch.float32 if bucket.dtype == torch.bfloat16 else bucket.dtype
        if isinstance(config.compressor, Cast) and config.compressor.dtype.itemsize < wire_dtype.itemsize:
            wire_dtype = config.compressor.dtype
        self._payload = (
            self.out.flat if wire_dtype == bucket.dtype else torch.zeros_like(self.out.flat, dtype=wire_dtype)
        )
        self._ring = FlatAllreduce(self._payload, "dense", bucket, context)
        self._absorbed: set[int] = set()

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        view = self.out.views[index]
        self._absorbed.add(index)
        if gradient.data_ptr() == view.data_ptr():
            return gradient
        view.copy_(gradient)
        return view.detach()

    def discard_step(self) -> None:
        self._absorbed.clear()

    def drain(self) -> None:
        self._ring.wait()

    def buffers(self) -> dict[str, FlatBuffer]:
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
        if self._payload is not self.out.flat:
            self._payload.copy_(self.out.flat)
        self._ring.launch()
        self._context.recorder.encode_seconds(time.perf_counter() - begin)

    def finish(self) -> list[Tensor]:
        begin = time.perf_counter()
        self._ring.wait()
        waited = time.perf_counter()
        if self._payload is not self.out.flat:
            self.out.flat.copy_(self._payload)
        self._context.recorder.wait_seconds(waited - begin)
        self._context.recorder.decode_seconds(time.perf_counter() - waited)
        return [view.detach() for view in self.out.views]  # whose memory the user may exchange: p.grad.data = ...
