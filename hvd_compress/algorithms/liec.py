"""LIEC-SGD: two-way compression with local immediate error compensation (Cheng et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import (
    GradientAlgorithm,
    nonfinite_policy,
    payload_limit,
    require_combining,
    require_constant,
)
from hvd_compress.algorithms.bucket_state import Rate, SavedParameter
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import BlockSign, Combine, Compressor, Identity
from hvd_compress.exchange import Context, FlatAllreduce, ShardedServerExchange, require_countable
from hvd_compress.finite import require_policy, take_out


@dataclass(frozen=True)
class LIEC(GradientAlgorithm):
    """Local immediate error compensation: what a rank did not send it applies to its own model at once.

    Each rank trains a model z_k of its own. With g_k the gradient there, s the server's error:

        send C(g_k);  r_k = g_k - C(g_k);  p = mean_k C(g_k) + s;  q = C(p);  s = p - q;  d_k = q + r_k

    and the wrapped optimizer steps along d_k, which is what ``p.grad`` holds after ``synchronize()``. Every
    ``averaging_period`` steps nothing is compressed: z_k = mean_k z_k, d_k = mean_k g_k + s, s = 0. The model
    to evaluate or save is mean_k z_k: ``optimizer.consensus()``. The authors use plain SGD; with momentum the
    models still average to the same mean, but differ after an averaging step. Statistics of
    batch normalisation are not parameters: take rank 0's (``hvd.broadcast_parameters`` of the buffers).

    Args:
        compressor: what travels both ways; with random selections the draws up and down are independent. Any
            whose payload one rank can make alone.
        averaging_period: steps from one averaging to the next (the authors' T0: 32 or 100).
        rescale_residual: True keeps s in update units when the learning rate changes; False is the
            authors' variant.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is not allowed.
    """

    compressor: Compressor = field(default_factory=BlockSign)
    averaging_period: int = 32
    rescale_residual: bool = True
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        allowed = (Combine.SUM, Combine.GATHER)
        require_constant("LIEC", "compressor", require_combining("LIEC", "compressor", self.compressor, allowed))
        validation.integer("LIEC", "averaging_period", self.averaging_period, 1)
        validation.boolean("LIEC", "rescale_residual", self.rescale_residual)
        require_policy("LIEC", self.nonfinite)

    @property
    def local_models(self) -> bool:
        return True

    @property
    def allreduce_only(self) -> bool:
        return False

    def bucket_limit(self, ranks: int) -> float:
        return payload_limit(self.compressor, ranks, gathered=False)

    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        return _LIECState(self, bucket, context)


class _LIECState(GradientState):
    """One vector that holds g_k, then r_k, then d_k; the server's error is in gradient units of the last rate.

    The parameters are views of a flat vector that is saved with the state: the model of a checkpoint is the mean.
    """

    def __init__(self, config: LIEC, bucket: Bucket, context: Context) -> None:
        self.bucket, self._config, self._context = bucket, config, context
        self.has_residual = not isinstance(config.compressor, Identity)
        require_countable(bucket, "models and gradients to be averaged", 2 * bucket.layout.total)
        self._exchange = ShardedServerExchange(bucket, config.compressor, config.compressor, context)
        self._local = bucket.flat_buffer(bucket.dtype)
        bucket.move_params_to(self._local)
        self._direction = bucket.flat_buffer(bucket.state_dtype)
        self._out = self._direction if bucket.dtype == bucket.state_dtype else bucket.flat_buffer(bucket.dtype)
        self._carried: Optional[FlatBuffer] = None  # joins the next gradient: a former server's error
        self._mean: Optional[_Mean] = None
        self._averaging = False
        self._loss_scale = self._factor = 1.0

    # -- one exchange ------------------------------------------------------------------------------------

    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        if (former_shard_error := self._exchange.reshard()) is not None:
            self.pending_buffer().flat.add_(former_shard_error)
            self._exchange.hold(self.inactive)
        factor = self._factor = self.residual_rescale(rate, self._config.rescale_residual)
        self._loss_scale = rate.loss_scale
        self._collect(gradients)
        g = self._direction.flat
        if rate.loss_scale != 1.0:
            g.mul_(1.0 / rate.loss_scale)
        if self._carried is not None:
            active = [i for i in range(len(gradients)) if i not in self.inactive]
            g_views, carried_views = ([b.views[i] for i in active] for b in (self._direction, self._carried))
            torch._foreach_add_(g_views, carried_views, alpha=factor)
        self.nonfinite = take_out(g, self._direction.views)
        self._averaging = (step + 1) % self._config.averaging_period == 0
        if self._averaging:
            self._launch_averaging()
        else:
            self._exchange.set_step(step)
            self._exchange.rescale_server_error(factor)
            self._exchange.encode(g)
            self._exchange.launch()

    def _collect(self, gradients: Sequence[Optional[Tensor]]) -> None:
        """Copy gradients into the flat vector, zeros where one is missing."""
        views = self._direction.views
        missing = [view for view, g in zip(views, gradients) if g is None]
        found = [(view, g) for view, g in zip(views, gradients) if g is not None and g.data_ptr() != view.data_ptr()]
        if missing:
            torch._foreach_zero_(missing)
        if found:
            torch._foreach_copy_([view for view, _ in found], [g for _, g in found])

    def _launch_averaging(self) -> None:
        """Send the local model and g_k, each server adding the error of its shard."""
        if self._mean is None:
            self._mean = _Mean(self.bucket, self._context)
        torch._foreach_copy_(self._mean.models.views, [p.data for p in self.bucket.parameters])
        torch.add(self._direction.flat, self._exchange.server_pending(), alpha=self._factor, out=self._mean.gradients)
        self._mean.allreduce.launch()

    def next_round(self) -> None:
        if not self._averaging:
            self._exchange.next_round()

    def finish(self) -> list[Tensor]:
        d = self._direction.flat
        if self._averaging:
            assert self._mean is not None
            self._mean.allreduce.wait()
            d.copy_(self._mean.gradients)
        else:
            self._exchange.wait()
            self._exchange.subtract_sent(d)
            self._exchange.add_aggregate(d, 1.0)
        scale = self._loss_scale * self._context.sum_factor
        if scale != 1.0:
            d.mul_(scale)
        if self._out is not self._direction:
            self._out.flat.copy_(d)
        return [view.detach() for view in self._out.views]  # the user may give them other memory: p.grad.data = ...

    def commit(self) -> None:
        super().commit()
        if self._carried is not None:
            self._carried.flat.mul_(self._factor)
            self._clear_carried()
        if not self._averaging:
            self._exchange.commit()
            return
        assert self._mean is not None
        with torch.no_grad():
            self.bucket.write_params(self._mean.models.flat, self.inactive)
        self._exchange.clear_server_error()
        self._exchange.error.mul_(self._factor)  # of parameters that rest

    def _clear_carried(self) -> None:
        """Set what joins the next gradient to zero, but for parameters that rest."""
        if self._carried is not None and self.inactive:
            self._carried.clear(self.inactive)
        else:
            self._carried = None

    def set_inactive(self, inactive: frozenset[int]) -> None:
        super().set_inactive(inactive)
        self._exchange.hold(inactive)

    def discard_step(self) -> None:
        """Return at once: everything that ``start`` has changed is made anew by the next one."""

    def drain(self) -> None:
        if self._averaging and self._mean is not None:
            self._mean.allreduce.wait()
        else:
            self._exchange.drain()

    # -- points and residual -----------------------------------------------------------------------------

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        """Return the mean of the local models."""
        if comm.size == 1:
            return None
        return comm.allreduce(self.bucket.copy_of_params(), f"{self.bucket.name}.models")

    def replica(self) -> list[Tensor]:
        return []

    def pending_buffer(self) -> FlatBuffer:
        if self._carried is None:
            self._carried = self.bucket.flat_buffer(self.bucket.state_dtype)
        return self._carried

    def residual_vector(self) -> Optional[Tensor]:
        error = self._exchange.error
        return error if self._carried is None else torch.cat((error, self._carried.flat))

    def pending_gradient(self) -> Optional[Tensor]:
        pending = self._exchange.server_pending()
        if self._carried is not None:
            pending.add_(self._active(self._carried.flat))
        return pending.mul_(self._context.sum_factor)

    def clear_residual(self) -> None:
        self._exchange.clear_server_error()
        self._clear_carried()

    # -- checkpoints -------------------------------------------------------------------------------------

    def buffers(self) -> dict[str, FlatBuffer]:
        self.bucket.ensure_params_in(self._local)
        carried = {"carried": self._carried} if self._carried is not None else {}
        return {**carried, "server": self._exchange.server_error(), "local": self._local}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if "buffers" in saved:
            self._carried = None
            if "carried" in saved["buffers"]:
                self.pending_buffer()
        super().load_state_dict(saved)

    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        taken = super().restore(parts, own)
        self.bucket.ensure_params_in(self._local)
        for name, view in zip(self.bucket.layout.names, self._local.views):
            part = parts.get(name, SavedParameter())
            if own and part.shared is None and part.local is not None:
                view.copy_(part.local)
        return taken


class _Mean:
    """Models and gradients side by side, averaged in one collective."""

    def __init__(self, bucket: Bucket, context: Context) -> None:
        total = bucket.layout.total
        buffer = torch.zeros(2 * total, dtype=bucket.state_dtype, device=bucket.device)
        self.models, self.gradients = bucket.flat_buffer(bucket.state_dtype, buffer[:total]), buffer[total:]
        self.allreduce = FlatAllreduce(buffer, f"{bucket.name}.mean", bucket, context, average=True)
