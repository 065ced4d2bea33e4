"""LIEC-SGD: two-way compression with local immediate error compensation (Cheng et al. 2024)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Container, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, limit_for, require_combining, require_constant
from hvd_compress.algorithms.bucket_state import GradientState, Rate
from hvd_compress.bucket import BUCKET_BYTES, PAYLOAD_BYTES, Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import BlockSign, Combine, Compressor, Identity
from hvd_compress.exchange import Context, FlatAllreduce, ShardedServerExchange, require_countable


@dataclass(frozen=True)
class LIEC(Algorithm):
    """Local immediate error compensation: what a rank did not send it applies to its own model at once.

    Each rank trains a model z_k of its own. With g_k the gradient there, s the server's error:

        send C(g_k);  r_k = g_k - C(g_k);  p = mean_k C(g_k) + s;  q = C(p);  s = p - q;  d_k = q + r_k

    and the wrapped optimizer steps along d_k, which is what ``p.grad`` holds after ``synchronize()``. Every
    ``averaging_period`` steps nothing is compressed: z_k = mean_k z_k, d_k = mean_k g_k + s, s = 0. The model
    to evaluate or save is mean_k z_k: ``optimizer.consensus()``. The authors use plain SGD; with momentum the
    models still average to the same mean, but stay apart after an averaging step. Statistics of
    batch normalisation are not parameters: take rank 0's (``hvd.broadcast_parameters`` of the buffers).

    Args:
        compressor: what travels both ways; with random selections the draws up and down are independent. Any
            whose payload one rank can make alone.
        averaging_period: steps from one averaging to the next (the authors' T0: 32 or 100).
        rescale_residual: True keeps s in update units when the learning rate changes; False is the
            authors' variant.

    Raises:
        ValueError: if an argument is not allowed.
    """

    local_models: ClassVar[bool] = True

    compressor: Compressor = field(default_factory=BlockSign)
    averaging_period: int = 32
    rescale_residual: bool = True

    def __post_init__(self) -> None:
        allowed = (Combine.SUM, Combine.GATHER)
        require_constant("LIEC", "compressor", require_combining("LIEC", "compressor", self.compressor, allowed))
        validation.integer("LIEC", "averaging_period", self.averaging_period, 1)
        validation.boolean("LIEC", "rescale_residual", self.rescale_residual)

    @property
    def bucket_bytes(self) -> float:
        return max(BUCKET_BYTES, PAYLOAD_BYTES / self.compressor.payload_ratio)

    def bucket_limit(self, ranks: int) -> float:
        return limit_for(self.compressor, ranks, gathered=False)

    @property
    def gathers(self) -> bool:
        return True

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _LIECState(self, bucket, context)


class _LIECState(GradientState):
    """``_direction`` holds g_k, then r_k, then d_k; the server's error is in gradient units of the last rate.

    The parameters are views of a flat vector that is saved with the state: the model of a checkpoint is the mean.
    """

    replicated = False

    def __init__(self, config: LIEC, bucket: Bucket, context: Context) -> None:
        self.bucket, self._config, self._context = bucket, config, context
        self.delays = not isinstance(config.compressor, Identity)
        require_countable(bucket, "models and gradients to be averaged", 2 * bucket.layout.total)
        self._exchange = ShardedServerExchange(bucket, config.compressor, config.compressor, context)
        self._local = bucket.flat_buffer(bucket.dtype)
        bucket.move_params_to(self._local)
        self._direction = bucket.flat_buffer(bucket.state_dtype)
        self._out = self._direction if bucket.dtype == bucket.state_dtype else bucket.flat_buffer(bucket.dtype)
        self._carried: Optional[FlatBuffer] = None  # a former owner's error, after shards have been cut anew
        self._mean: Optional[_Mean] = None
        self._averaging = False
        self._loss_scale = 1.0

    def buffers(self) -> dict[str, FlatBuffer]:
        self.bucket.ensure_params_in(self._local)
        carried = {"carried": self._carried} if self._carried is not None else {}
        return {**carried, "server": self._exchange.error_buffer(), "local": self._local}

    def expect(self, kinds: Container[str]) -> None:
        self._carried = self.bucket.flat_buffer(self.bucket.state_dtype) if "carried" in kinds else None

    def scalars(self) -> dict[str, Any]:
        return {"lr": self._lr, "owed_at": self.owed_at}

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        self._lr, self.owed_at = float(saved["lr"]), saved["owed_at"]

    def conversion(self, saved: Mapping[str, Any]) -> float:
        there, here = saved["owed_at"], self.owed_at
        return 1.0 if there is None or here is None else float(there / here)

    def take_back(self, index: int, begin: int, values: Tensor) -> None:
        part = self.bucket.part(self._carry().flat, index)
        part[begin : begin + values.numel()].add_(values, alpha=self._context.comm.size)

    def _carry(self) -> FlatBuffer:
        """What joins the next gradient."""
        if self._carried is None:
            self._carried = self.bucket.flat_buffer(self.bucket.state_dtype)
        return self._carried

    def residual(self) -> Optional[Tensor]:
        error = self._exchange.error
        return error if self._carried is None else torch.cat((error, self._carried.flat))

    def discard_step(self) -> None:
        """Nothing is absorbed before ``start``."""

    def drain(self) -> None:
        if self._averaging and self._mean is not None:
            self._mean.ring.wait()
        else:
            self._exchange.drain()
        self._averaging = False

    def _follow(self, rate: Rate) -> None:
        """Keep what the server owes in update units: eta_{t-1} / eta_t times as much gradient."""
        if (owed := self._exchange.resettle()) is not None:
            self._carry().flat.add_(owed)
        if (before := self.turn(rate, self._config.rescale_residual)) != rate.lr:
            self._exchange.error.mul_(before / rate.lr)
            if self._carried is not None:
                self._carried.flat.mul_(before / rate.lr)
        self._loss_scale = rate.loss_scale

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        begin = time.perf_counter()
        self._averaging = False  # also if the last one has failed
        self._follow(rate)
        views = self._direction.views
        missing = [view for view, g in zip(views, gradients) if g is None]
        found = [(view, g) for view, g in zip(views, gradients) if g is not None and g.data_ptr() != view.data_ptr()]
        if missing:
            torch._foreach_zero_(missing)
        if found:
            torch._foreach_copy_([view for view, _ in found], [g for _, g in found])
        g = self._direction.flat
        if rate.loss_scale != 1.0:
            g.mul_(1.0 / rate.loss_scale)
        if self._carried is not None:
            g.add_(self._carried.flat)
        if (step + 1) % self._config.averaging_period == 0:
            self._launch_averaging()
        else:
            self._exchange.set_step(step)
            self._exchange.encode(g)
            self._exchange.launch()
        self._context.recorder.encode_seconds(time.perf_counter() - begin)

    def _launch_averaging(self) -> None:
        """Send the local model and g_k, each owner adding the error of its shard."""
        if self._mean is None:
            self._mean = _Mean(self.bucket, self._context)
        torch._foreach_copy_(self._mean.models.views, [p.data for p in self.bucket.parameters])
        self._mean.gradients.copy_(self._direction.flat)
        begin, end = self._exchange.span
        self._mean.gradients[begin:end].add_(self._exchange.error, alpha=self._context.comm.size)
        self._mean.ring.launch()
        self._averaging = True

    def next_round(self) -> None:
        if not self._averaging:
            self._exchange.next_round()

    def finish(self) -> list[Tensor]:
        if self._averaging:
            self._finish_averaging()
        else:
            self._exchange.wait()
        begin = time.perf_counter()
        d = self._direction.flat
        if not self._averaging:
            self._exchange.subtract_sent(d)
            self._exchange.add_aggregate(d, 1.0)
        self._carried, self._averaging = None, False
        scale = self._loss_scale * (1 if self._context.averages else self._context.comm.size)
        if scale != 1.0:
            d.mul_(scale)
        if self._out is not self._direction:
            self._out.flat.copy_(d)
        self._context.recorder.decode_seconds(time.perf_counter() - begin)
        return [view.detach() for view in self._out.views]  # whose memory the user may exchange: p.grad.data = ...

    def _finish_averaging(self) -> None:
        begin = time.perf_counter()
        assert self._mean is not None
        self._mean.ring.wait()
        self._context.recorder.wait_seconds(time.perf_counter() - begin)
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self.bucket.parameters], self._mean.models.views)
        self._direction.flat.copy_(self._mean.gradients)
        self._exchange.error.zero_()

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        """The mean of the local models."""
        if comm.size == 1:
            return None
        return comm.allreduce(self.parameters_now(), f"{self.bucket.name}.models")

    def debt(self) -> Optional[Tensor]:
        debt = self._exchange.owed()
        if self._carried is not None:
            debt.add_(self._carried.flat)
        return debt if self._context.averages else debt.mul_(self._context.comm.size)

    def forgive(self) -> None:
        self._exchange.error.zero_()
        self._carried = None


class _Mean:
    """Models and gradients side by side, averaged in one collective."""

    def __init__(self, bucket: Bucket, context: Context) -> None:
        total = bucket.layout.total
        buffer = torch.zeros(2 * total, dtype=bucket.state_dtype, device=bucket.device)
        self.models, self.gradients = bucket.flat_buffer(bucket.state_dtype, buffer[:total]), buffer[total:]
        self.ring = FlatAllreduce(buffer, "mean", bucket, context, averages=True)
