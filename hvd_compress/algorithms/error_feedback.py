"""Classic error feedback on gradients: what was not sent is added to the next gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import GradientAlgorithm, nonfinite_policy, require_combining
from hvd_compress.algorithms.bucket_state import Rate
from hvd_compress.algorithms.gradient_state import SMALL, GradientState
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors import Combine, Compressor, Identity
from hvd_compress.exchange import Context, ExchangeSchedule
from hvd_compress.finite import require_policy, take_out


@dataclass(frozen=True)
class EF(GradientAlgorithm):
    """Error feedback on gradients, before the wrapped optimizer (EF-SGD with momentum after aggregation).

    Each step, with rank k's gradient g_k and residual e_k,

        p_k = g_k + (eta_{t-1} / eta_t) e_k;   g = mean_k C(p_k);   e_k = p_k - C(p_k)

    and the wrapped optimizer steps with g, which is what ``p.grad`` holds after ``synchronize()``. The
    ratio of learning rates keeps the residual's size in update units (a rate of 0 is passed over); it is 1 for
    optimizers whose update does not grow with the gradient (Adam and its kin). With top-k this is MEM-SGD
    (Stich et al. 2018, algorithm 1), with signs EF-SignSGD (Karimireddy et al. 2019, algorithm 1).

    Args:
        compressor: what is sent; any but a sketch. Summed payloads travel by one allreduce per bucket,
            top-k and signs by one allgather, low-rank factors by two allreduces.
        rescale_residual: False leaves the ratio out.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is out of range.
    """

    compressor: Compressor
    rescale_residual: bool = True
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        require_combining("EF", "compressor", self.compressor, (Combine.SUM, Combine.GATHER, Combine.JOINT))
        validation.boolean("EF", "rescale_residual", self.rescale_residual)
        require_policy("EF", self.nonfinite)

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _EFState(self, bucket, context)


class _EFState(GradientState):
    """The residual e_k, and p_k, which is formed as gradients arrive and becomes the next residual.

    The aggregate goes into the tensors that backward has left in ``p.grad``, which are zeroed while payloads
    travel: a buffer of our own would cost as much memory again, and freeing theirs page faults. Until then
    ``p.grad`` is this rank's gradient, which a script may inspect.
    """

    def __init__(self, config: EF, bucket: Bucket, context: Context) -> None:
        self.bucket, self._config, self._context = bucket, config, context
        self.has_residual = not isinstance(config.compressor, Identity)
        self._schedule = ExchangeSchedule(bucket, config.compressor, context)
        self._exchange = self._schedule.at(0)
        self._residual, self._compensated = (bucket.flat_buffer(bucket.state_dtype) for _ in range(2))
        self._targets: list[Optional[Tensor]] = [None] * len(bucket.parameters)
        self._ratio: Optional[float] = None  # of this step, once its first gradient has arrived
        self._loss_scale = 1.0

    def _begin_step(self, rate: Rate) -> float:
        """Return the factor of the residual at this step."""
        if self._ratio is None:
            self._ratio = self.residual_rescale(rate, self._config.rescale_residual)
            self._loss_scale = rate.loss_scale
        return self._ratio

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        """Compute ``p = g + ratio * e`` for one parameter; small ones are left to ``start``, all together."""
        if gradient.numel() < SMALL:
            return None
        ratio, out = self._begin_step(rate), self._compensated.views[index]
        if self._loss_scale != 1.0:
            torch.mul(gradient, 1.0 / self._loss_scale, out=out)
            gradient_unscaled = out
        else:
            gradient_unscaled = gradient
        torch.add(gradient_unscaled, self._residual.views[index], alpha=ratio, out=out)
        self._targets[index] = gradient
        return gradient

    def discard_step(self) -> None:
        self._targets = [None] * len(self._targets)
        self._ratio = None

    def drain(self) -> None:
        self._exchange.drain()

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        ratio = self._begin_step(rate)
        self._compensate([i for i, target in enumerate(self._targets) if target is None], gradients, ratio)
        self._targets = list(gradients)
        if self.has_residual:
            self.nonfinite = take_out(self._compensated.flat, self._compensated.views)
        self._exchange = self._schedule.at(step)
        self._exchange.set_step(step)
        self._exchange.encode(self._compensated.flat)
        self._exchange.launch()

    def _compensate(self, indices: Sequence[int], gradients: Sequence[Optional[Tensor]], ratio: float) -> None:
        """Compute ``p = g + ratio * e`` for some of the bucket's parameters; a missing gradient counts as zeros.

        Nothing is sent of parameters that rest: there p is zero.
        """
        p, e = self._compensated, self._residual
        found = [(p.views[i], g) for i in indices if (g := gradients[i]) is not None]
        missing = [p.views[i] for i in indices if gradients[i] is None]
        if missing:
            torch._foreach_zero_(missing)
        if found:
            views = [view for view, _ in found]
            torch._foreach_copy_(views, [g for _, g in found])
            if self._loss_scale != 1.0:
                torch._foreach_mul_(views, 1.0 / self._loss_scale)
        active = [i for i in indices if i not in self.inactive]
        if len(active) == len(gradients):
            p.flat.add_(e.flat, alpha=ratio)
        elif active:
            torch._foreach_add_([p.views[i] for i in active], [e.views[i] for i in active], alpha=ratio)

    def next_round(self) -> None:
        self._exchange.next_round()

    def finish(self) -> list[Tensor]:
        targets = [_room(t, view, self.bucket.dtype) for t, view in zip(self._targets, self._residual.views)]
        torch._foreach_zero_(targets)
        self._exchange.wait()
        self._exchange.subtract_sent(self._compensated.flat)
        self._exchange.write_aggregate([t.as_strided((t.numel(),), (1,)) for t in targets], self._loss_scale)
        return targets

    def commit(self) -> None:
        super().commit()
        for i in self.inactive:
            torch.mul(self._residual.views[i], self._ratio or 1.0, out=self._compensated.views[i])
        self._residual, self._compensated = self._compensated, self._residual
        self._exchange.commit()
        self.discard_step()

    def buffers(self) -> dict[str, FlatBuffer]:
        return {"residual": self._residual, **self._exchange.warm_start()}

    def pending_buffer(self) -> Optional[FlatBuffer]:
        return self._residual

    def residual_vector(self) -> Optional[Tensor]:
        return self._residual.flat

    def pending_gradient(self) -> Optional[Tensor]:
        return self._active(self._residual.flat).mul_(self._context.sum_factor)

    def reset(self) -> None:
        super().reset()
        self._schedule.reset()

    def clear_residual(self) -> None:
        self._residual.clear(self.inactive)


def _room(gradient: Optional[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``gradient`` itself if its memory has the order of ``like``, else a new tensor that has."""
    if gradient is not None and gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like, dtype=dtype)
