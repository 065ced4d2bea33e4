"""Classic error feedback on gradients: what was not sent is added to the next gradient."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, require_combining
from hvd_compress.algorithms.bucket_state import GradientState, Rate
from hvd_compress.bucket import BUCKET_BYTES, PAYLOAD_BYTES, Bucket, FlatBuffer
from hvd_compress.compressors import Combine, Compressor, Identity
from hvd_compress.exchange import Context, exchange_for


@dataclass(frozen=True)
class EF(Algorithm):
    """Error feedback on gradients, before the wrapped optimizer (EF-SGD with momentum after aggregation).

    Each step, with rank k's gradient g_k and residual e_k,

        p_k = g_k + (eta_{t-1} / eta_t) e_k;   g = mean_k C(p_k);   e_k = p_k - C(p_k)

    and the wrapped optimizer steps with g, which is what ``p.grad`` holds after ``synchronize()``. The
    ratio of learning rates keeps what is owed in update units (a rate of 0 is passed over); it is 1 for
    optimizers whose update does not grow with the gradient (Adam and its kin). With top-k this is MEM-SGD
    (Stich et al. 2018, algorithm 1), with signs EF-SignSGD (Karimireddy et al. 2019, algorithm 1).

    Args:
        compressor: what is sent; any but a sketch. Summed payloads travel by one allreduce per bucket,
            top-k and signs by one allgather, low-rank factors by two allreduces.
        rescale_residual: False leaves the ratio out.

    Raises:
        ValueError: if an argument is out of range.
    """

    compressor: Compressor
    rescale_residual: bool = True

    def __post_init__(self) -> None:
        require_combining("EF", "compressor", self.compressor, (Combine.SUM, Combine.GATHER, Combine.JOINT))
        validation.boolean("EF", "rescale_residual", self.rescale_residual)

    @property
    def bucket_bytes(self) -> float:
        return max(BUCKET_BYTES, PAYLOAD_BYTES / self.compressor.payload_ratio)

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _EFState(self, bucket, context)


class _EFState(GradientState):
    """The residual is kept as ``unit * e``, with ``unit`` following the learning rate.

    So a schedule that changes the rate at every step costs no pass over the residual: ``unit * g`` is
    what is added to it. With a constant rate ``unit`` is 1 and nothing is rounded.

    The aggregate goes into the tensors that backward has left in ``p.grad``, which are zeroed while payloads
    travel: a buffer of our own would cost as much memory again, and freeing theirs page faults. Until then
    ``p.grad`` is this rank's gradient, for who wants to look at it.
    """

    def __init__(self, config: EF, bucket: Bucket, context: Context) -> None:
        self.bucket, self._config, self._context = bucket, config, context
        self.delays = not isinstance(config.compressor, Identity)
        self._exchange = exchange_for(bucket, config.compressor, context)
        self._residual = bucket.flat_buffer(bucket.state_dtype)
        self._targets: list[Optional[Tensor]] = [None] * len(bucket.parameters)
        self._absorbed = False
        self._unit, self._loss_scale = 1.0, 1.0

    def buffers(self) -> dict[str, FlatBuffer]:
        return {"residual": self._residual, **self._exchange.warm_start()}

    def scalars(self) -> dict[str, Any]:
        return {"unit": self._unit, "lr": self._lr, "owed_at": self.owed_at}

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        self._unit, self._lr = float(saved["unit"]), float(saved["lr"])
        self.owed_at = saved["owed_at"]

    def conversion(self, saved: Mapping[str, Any]) -> float:
        there, here = saved["owed_at"], self.owed_at
        return float(self._unit / saved["unit"] * (1.0 if there is None or here is None else there / here))

    def residual(self) -> Optional[Tensor]:
        return self._residual.flat / self._unit

    def _follow(self, rate: Rate) -> None:
        if (before := self.turn(rate, self._config.rescale_residual)) != rate.lr:
            self._unit *= rate.lr / before
            if not 0.5 <= self._unit <= 2.0:
                # Payloads in float16 want numbers of the gradients' size; powers of two round nothing.
                fold = 2.0 ** -round(math.log2(self._unit))
                self._residual.flat.mul_(fold)
                self._unit *= fold
        self._loss_scale = rate.loss_scale

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        if not self._absorbed:
            self._follow(rate)
            self._absorbed = True
        view = self._residual.views[index]
        view.add_(gradient, alpha=self._unit / rate.loss_scale)
        self._targets[index] = gradient
        return gradient

    def discard_step(self) -> None:
        # What was absorbed stays in the residual and is sent with the next step.
        self._targets = [None] * len(self._targets)
        self._absorbed = False

    def drain(self) -> None:
        self._exchange.drain()

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        begin = time.perf_counter()
        if not self._absorbed:
            self._follow(rate)
        fresh = [i for i, g in enumerate(gradients) if g is not None and self._targets[i] is None]
        if fresh:
            found = [gradients[i] for i in fresh]
            views = [self._residual.views[i] for i in fresh]
            torch._foreach_add_(views, found, alpha=self._unit / rate.loss_scale)  # type: ignore[arg-type]
        self._exchange.set_step(step)
        self._exchange.encode(self._residual.flat)
        self._exchange.launch()
        for i in fresh:
            self._targets[i] = gradients[i]
        self._context.recorder.encode_seconds(time.perf_counter() - begin)

    def next_round(self) -> None:
        self._exchange.next_round()

    def finish(self) -> list[Tensor]:
        begin = time.perf_counter()
        targets = [_room(t, view, self.bucket.dtype) for t, view in zip(self._targets, self._residual.views)]
        torch._foreach_zero_(targets)
        self._context.recorder.decode_seconds(time.perf_counter() - begin)
        self._exchange.wait()
        begin = time.perf_counter()
        # Only now is what was sent no longer owed: had the exchange failed, nothing would be lost.
        self._exchange.subtract_sent(self._residual.flat)
        flats = [t.as_strided((t.numel(),), (1,)) for t in targets]
        self._exchange.write_aggregate(flats, self._loss_scale / self._unit)
        self.discard_step()
        self._context.recorder.decode_seconds(time.perf_counter() - begin)
        return targets

    def debt(self) -> Optional[Tensor]:
        # With op=Sum the wrapped optimizer will see the ranks' sum.
        shares = 1 if self._context.averages else self._context.comm.size
        return self._residual.flat * (shares / self._unit)

    def forgive(self) -> None:
        self._residual.flat.zero_()


def _room(gradient: Optional[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient`` itself if its memory has the order of ``like``, else a new tensor that has."""
    if gradient is not None and gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like, dtype=dtype)
