"""The state of an algorithm that exchanges updates, after the wrapped optimizer has stepped."""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import BucketState, SavedParameter, add_to_views, require_same_shape
from hvd_compress.algorithms.momentum_masking import MomentumMask
from hvd_compress.algorithms.residual_update import Coefficient, ResidualUpdate, detached_point
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors.base import pieces
from hvd_compress.exchange import Context, Exchange, ExchangeSchedule


class UpdateState(BucketState):
    """The shared model x, this rank's residual e, and its own point z = x - coefficient * e in the parameters.

    A step of the wrapped optimizer moves z by -u_k; u_k joins the residual, which is exchanged. x and e are flat in
    float32 (or float64), z in the parameters' dtype. With op=Sum the gradients have been multiplied by the number of
    ranks before that step (see ``engine.local_gradients``): updates are always averaged.

    Args:
        exchange: how updates travel; a schedule where that changes with the step.
        rescale: keep the residual in update units; else a change of learning rate changes it in proportion.
        masking: clear the wrapped optimizer's momentum where it was sent.

    Attributes:
        local_coefficient: the coefficient at which the parameters were placed.
        has_unsent_local_steps: the wrapped optimizer has stepped since the last exchange (several local steps per
            exchange).
    """

    def __init__(
        self,
        bucket: Bucket,
        context: Context,
        exchange: Union[Exchange, ExchangeSchedule],
        rescale: bool = True,
        masking: bool = False,
    ) -> None:
        self.bucket, self.context, self._rescale = bucket, context, rescale
        self._schedule, self.exchange = exchange, exchange.at(0)
        self.shared = bucket.flat_buffer(bucket.state_dtype)
        self.residual = bucket.flat_buffer(bucket.state_dtype)
        self.local = bucket.flat_buffer(bucket.dtype)
        bucket.move_params_to(self.local)
        self._update = ResidualUpdate(self.shared.flat, self.residual.flat, self.local.flat)
        self._momentum = MomentumMask(bucket, context) if masking else None
        self.local_coefficient: Coefficient = 0.0
        self.has_unsent_local_steps = False
        self._lr = math.nan
        self.set_shared_from_params()

    # -- one exchange ------------------------------------------------------------------------------------

    @property
    def next_coefficient(self) -> Coefficient:
        """The coefficient of z after the exchange; 0: the parameters hold x itself."""
        return 0.0

    def start(self, step: int, lr: float) -> None:
        """Add what the wrapped optimizer has subtracted to the residual, encode, launch."""
        self.set_step(step)
        self.accumulate_update(lr)
        self.exchange.encode(self.residual.flat)
        self.exchange.launch()

    def set_step(self, step: int) -> None:
        """Prepare the exchange of ``step``."""
        self.exchange = self._schedule.at(step)
        if (former_shard_error := self.exchange.reshard()) is not None:
            self.residual.flat.add_(former_shard_error)
        self.exchange.set_step(step)

    def accumulate_update(self, lr: float) -> None:
        """Compute ``e = e + u``, where u is what the wrapped optimizer has subtracted; z goes to its next point."""
        self._update.apply(self.local_coefficient, self.next_coefficient, self.rescale_for_lr(lr))
        self.local_coefficient = self.next_coefficient

    def rescale_for_lr(self, lr: float) -> float:
        """Go on to rate ``lr``; rescale the server's error, and return the factor by which the residual is to be."""
        factor = lr / self._lr if not self._rescale and self._lr > 0 and lr > 0 else 1.0
        if factor != 1.0:
            self.exchange.rescale_server_error(factor)
        self._lr, self.has_unsent_local_steps = lr, False
        return factor

    def next_round(self) -> None:
        self.exchange.next_round()

    def finish(self) -> None:
        """Wait for the aggregate and apply it."""
        self.exchange.wait()
        self.apply_aggregate()
        self.mask_momentum()

    def apply_aggregate(self) -> None:
        """Compute ``e = e - C(e);  x = x - aggregate;  z = x - coefficient * e``."""
        self.exchange.subtract_sent(self.residual.flat)
        self.exchange.add_aggregate(self.shared.flat, -1.0)
        self.write_local_point()

    def mask_momentum(self) -> None:
        """Clear the wrapped optimizer's momentum where it was sent, if that is asked for."""
        if self._momentum is not None:
            self._momentum.clear(self.exchange.clear)

    # -- where the model is ------------------------------------------------------------------------------

    def set_shared_from_params(self) -> None:
        """Take the parameters as they are for the shared model."""
        self.shared.flat.copy_(self.local.flat)
        self.local_coefficient = 0.0

    def expected_local(self) -> Tensor:
        """Return the point (flat, new) at which the parameters were placed after the last exchange."""
        point = torch.empty_like(self.local.flat)
        detached_point(self.shared.flat, self.residual.flat, self.local_coefficient, point)
        return point

    def write_local_point(self) -> None:
        """Write this rank's own point, as it was last chosen, into the parameters."""
        detached_point(self.shared.flat, self.residual.flat, self.local_coefficient, self.local.flat)

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        return self.shared.flat

    def replica(self) -> list[Tensor]:
        return list(pieces(self.shared.flat, self.bucket.layout.numels))

    def reset_to(self, point: Tensor) -> None:
        self.shared.flat.copy_(point)
        self.has_unsent_local_steps = False
        self.clear_residual()
        self.write_local_point()

    def adopt_overwritten(self, overwritten: Sequence[bool], alone: bool) -> None:
        """Make parameters that were overwritten, with the same values on all ranks, the shared model.

        Args:
            overwritten: whether that is so, for each parameter of the bucket (an empty one never is).
            alone: there is one rank only. Then it may as well have clipped its weights, so the shared
                model moves by as much as the parameters, and the residual stays as it is.
        """
        if not any(overwritten):
            return
        if alone:
            written = self.local.flat.to(self.shared.flat.dtype, copy=True)
            self.write_local_point()
            self.shared.flat.add_(written - self.local.flat.to(written.dtype))
            self.local.flat.copy_(written)
        elif all(new or not p.numel() for new, p in zip(overwritten, self.bucket.parameters)):
            self.set_shared_from_params()
        else:
            # A bucket has one coefficient. So an overwritten parameter moves to this rank's own point about the new
            # model, which makes no update of it, and the others keep what their rank has changed.
            before = self.bucket.flat_buffer(self.bucket.dtype, self.local.flat.clone())
            taken, kept = ([i for i, new in enumerate(overwritten) if new is wanted] for wanted in (True, False))
            torch._foreach_copy_([self.shared.views[i] for i in taken], [self.local.views[i] for i in taken])
            self.write_local_point()
            torch._foreach_copy_([self.local.views[i] for i in kept], [before.views[i] for i in kept])

    # -- residual ----------------------------------------------------------------------------------------

    def residual_vector(self) -> Optional[Tensor]:
        server = self.exchange.server_error()
        return self.residual.flat if server is None else torch.cat((self.residual.flat, server.flat))

    def pending_update(self, lr: float) -> Optional[Tensor]:
        pending = self.residual.flat.clone()
        if self.has_unsent_local_steps:
            pending.add_(self.expected_local().to(pending.dtype).sub_(self.local.flat))
        server = self.exchange.server_pending()
        return pending if server is None else pending.add_(server)

    def clear_residual(self) -> None:
        self.residual.flat.zero_()
        self.exchange.clear_server_error()

    # -- checkpoints -------------------------------------------------------------------------------------

    def buffers(self) -> dict[str, FlatBuffer]:
        found = {"shared": self.shared, "residual": self.residual, **self.exchange.warm_start()}
        if (server := self.exchange.server_error()) is not None:
            found["server"] = server
        # Local steps since the last exchange are nowhere but in the parameters.
        return {**found, "local": self.local} if self.has_unsent_local_steps else found

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "local_coefficient": float(self.local_coefficient),
            "lr": self._lr,
            "has_unsent_local_steps": self.has_unsent_local_steps,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._lr, self.local_coefficient = float(saved["lr"]), float(saved["local_coefficient"])
        self.has_unsent_local_steps = bool(saved["has_unsent_local_steps"])
        if "buffers" in saved:
            found = self.local.flat.clone()
            super().load_state_dict(saved)
            if not self.has_unsent_local_steps:
                self.write_local_point()
            self.restore_point(found, self.local.flat)

    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        names, found = self.bucket.layout.names, self.local.flat.clone()
        known = all(name in parts and parts[name].shared is not None for name in names)
        self.clear_residual()
        self.has_unsent_local_steps, self.local_coefficient = False, 0.0
        if known:
            saved_point = self.bucket.flat_buffer(self.bucket.dtype)
            for name, x, z in zip(names, self.shared.views, saved_point.views):
                _copy(name, parts[name].shared, x)
                _copy(name, parts[name].local, z)
            self.write_local_point()
            self.restore_point(found, saved_point.flat)
        else:
            self.set_shared_from_params()
        pending = {n: (p.pending, p.lr) for n, p in parts.items() if own and p.pending is not None and p.lr is not None}
        return add_to_views(self.residual, names, pending)

    def restore_point(self, found: Tensor, saved_point: Tensor) -> None:
        """Decide where the model is, once the buffers have been restored.

        Parameters that are neither the restored shared model nor this rank's saved point are a model that the user has
        loaded, and become the shared one.

        Args:
            found: the flat parameters as the user left them.
            saved_point: this rank's own point as it was saved, flat.
        """
        if not self.bucket.layout.total:
            return
        # Another build or device may round the last bit of a rank's own point differently.
        slack = 8 * torch.finfo(found.dtype).eps * self.shared.flat.abs().max()
        if any(bool((found - point).abs().max() <= slack) for point in (saved_point, self.shared.flat)):
            return
        self.local.flat.copy_(found)
        self.set_shared_from_params()

    def reset_from_parameters(self) -> None:
        self.bucket.ensure_params_in(self.local)
        if self.has_unsent_local_steps:
            # All ranks compare their parameters before the next exchange, and so tell a loaded model from local steps.
            self.has_unsent_local_steps = False
            self.clear_residual()
            return
        found = self.local.flat.clone()
        self.write_local_point()
        self.restore_point(found, self.local.flat)
        self.clear_residual()
        self.write_local_point()


def _copy(name: str, source: Optional[Tensor], target: Tensor) -> None:
    """Copy a saved tensor of parameter ``name``, if there is one."""
    if source is not None:
        require_same_shape(name, source, target)
        with torch.no_grad():
            target.copy_(source)
