"""Plain data-parallel training through our own pipeline: the baseline everything is compared with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import GradientAlgorithm, nonfinite_policy
from hvd_compress.algorithms.bucket_state import Rate, SavedParameter
from hvd_compress.algorithms.gradient_state import SMALL, GradientState
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors import Cast, Compressor, Identity
from hvd_compress.exchange import Context, FlatAllreduce
from hvd_compress.finite import require_policy


@dataclass(frozen=True, init=False)
class Dense(GradientAlgorithm):
    """Average gradients in contiguous buckets, nothing compressed, nothing remembered.

    Args:
        compressor: ``Identity()``, or ``Cast(torch.float16)`` for what Horovod calls ``Compression.fp16``. No residual
            keeps what the cast loses, so a value beyond its range becomes an infinity that can be seen.
        wire: deprecated name of ``compressor``.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if ``compressor`` is another compressor: what it does not send would be lost; if ``nonfinite`` has
            another value.
    """

    compressor: Compressor = Identity()  # noqa: RUF009 - frozen
    nonfinite: str = nonfinite_policy()

    def __init__(
        self,
        compressor: Compressor = Identity(),  # noqa: B008 - frozen
        *,
        wire: Optional[Compressor] = None,
        nonfinite: str = "propagate",
    ) -> None:
        if wire is not None:
            warnings.warn("Dense(wire=...) is now Dense(compressor=...)", DeprecationWarning, stacklevel=2)
            compressor = wire
        if not isinstance(compressor, (Identity, Cast)):
            raise ValueError(
                f"Dense: compressor={compressor!r} is not allowed; it must be Identity() or Cast(...). "
                "Lossy compressors need error feedback: use EF(...) or DEF(...)"
            )
        require_policy("Dense", nonfinite)
        object.__setattr__(self, "compressor", compressor)
        object.__setattr__(self, "nonfinite", nonfinite)

    @property
    def wire(self) -> Compressor:
        """Return ``compressor`` by its deprecated name."""
        warnings.warn("Dense.wire is now Dense.compressor", DeprecationWarning, stacklevel=2)
        return self.compressor

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _DenseState(self, bucket, context)


class _DenseState(GradientState):
    """Gradients are copied into ``out``, or are views of it already, and ``out`` is reduced in place."""

    has_residual = False

    def __init__(self, config: Dense, bucket: Bucket, context: Context) -> None:
        self.bucket = bucket
        self.out = bucket.flat_buffer(bucket.dtype)
        # Horovod cannot sum bfloat16; other dtypes travel as they are unless a Cast narrows them.
        dtype = torch.float32 if bucket.dtype == torch.bfloat16 else bucket.dtype
        if isinstance(config.compressor, Cast) and config.compressor.dtype.itemsize < dtype.itemsize:
            dtype = config.compressor.dtype
        self._payload = self.out.flat if dtype == bucket.dtype else torch.zeros_like(self.out.flat, dtype=dtype)
        self._allreduce = FlatAllreduce(self._payload, f"{bucket.name}.dense", bucket, context)
        self._accumulated: set[int] = set()

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        if gradient.numel() < SMALL:
            return None
        view = self.out.views[index]
        self._accumulated.add(index)
        if gradient.data_ptr() == view.data_ptr():
            return gradient
        view.copy_(gradient)
        return view.detach()

    def discard_step(self) -> None:
        self._accumulated.clear()

    def drain(self) -> None:
        self._allreduce.wait()

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        targets, sources, missing = [], [], []
        for index, (view, gradient) in enumerate(zip(self.out.views, gradients)):
            if index in self._accumulated:
                continue
            if gradient is None:
                missing.append(view)
            elif gradient.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(gradient)
        self._accumulated.clear()
        if missing:
            torch._foreach_zero_(missing)
        if targets:
            torch._foreach_copy_(targets, sources)
        if self._payload is not self.out.flat:
            self._payload.copy_(self.out.flat)
        self._allreduce.launch()

    def finish(self) -> list[Tensor]:
        self._allreduce.wait()
        if self._payload is not self.out.flat:
            self.out.flat.copy_(self._payload)
        return [view.detach() for view in self.out.views]  # the user may give them other memory: p.grad.data = ...

    # -- there is no residual ----------------------------------------------------------------------------

    def buffers(self) -> dict[str, FlatBuffer]:
        return {}

    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        return set()

    def residual_vector(self) -> Optional[Tensor]:
        return None

    def pending_gradient(self) -> Optional[Tensor]:
        return None

    def clear_residual(self) -> None:
        """Return at once: there is no residual."""
