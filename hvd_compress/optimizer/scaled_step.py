"""The step of a ``GradScaler`` on all ranks: skipped everywhere or nowhere, on unscaled gradients."""

from __future__ import annotations

import torch

from hvd_compress.engine import grad_scaler
from hvd_compress.engine.reducer import Reducer


class ScaledStep:
    """The first part of an optimizer's ``step()`` when a ``GradScaler`` calls it.

    Args:
        reducer: of the distributed optimizer, to which the scaler gives ``found_inf`` and ``grad_scale`` for the call.
        fused: whether the wrapped optimizer can skip and unscale by itself.

    Attributes:
        overflowed: whether the exchange of this step was called off, on all ranks.
    """

    def __init__(self, reducer: Reducer, fused: bool) -> None:
        self._reducer, self._fused = reducer, fused
        self.overflowed = False

    def skip(self) -> bool:
        """Return whether the step is to be left out: on all ranks if any has an infinite gradient; if not, unscale."""
        optimizer, reducer = self._reducer.optimizer, self._reducer
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return False
        skip = self.overflowed or bool(found_inf)
        self.overflowed = False
        if reducer.comm.member:  # ranks outside the process set step for themselves
            skip = reducer.comm.any_rank(skip)
        if skip:
            if reducer.tracker.scaler is not None:
                grad_scaler.mark_overflow(reducer.tracker.scaler, optimizer)
            return True
        clips = reducer.comm.member and reducer.algorithm.clip_norm is not None
        if not self._fused or clips:  # clipping comes before the wrapped optimizer
            self._unscale()
        return False

    def _unscale(self) -> None:
        optimizer = self._reducer.optimizer
        if optimizer.grad_scale is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / float(optimizer.grad_scale))
        optimizer.grad_scale = optimizer.found_inf = None  # done; torch's plain optimizers refuse to see them
