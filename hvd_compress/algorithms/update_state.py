"""The state of an algorithm that exchanges updates, after the wrapped optimizer has stepped."""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional, Union, cast

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import BucketState, SavedParameter, add_to_views
from hvd_compress.algorithms.model_points import ModelPoints
from hvd_compress.algorithms.momentum_masking import MomentumMask
from hvd_compress.algorithms.residual_update import Coefficient, detached_point
from hvd_compress.algorithms.resting import RestingParameters
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors.layout import pieces
from hvd_compress.digest import digest
from hvd_compress.exchange import Context, Exchange, ExchangeSchedule
from hvd_compress.finite import poison, take_out


class UpdateState(BucketState):
    """The exchange of updates: a step of the wrapped optimizer moves z by -u; u joins the residual, which is exchanged.

    With op=Sum the gradients have been multiplied by the number of ranks before that step (see
    ``engine.local_gradients``): updates are always averaged.

    Args:
        exchange: how updates travel; a schedule where that changes with the step.
        rescale: keep the residual in update units; else a change of learning rate changes it in proportion.
        masking: clear the wrapped optimizer's momentum where it was sent.

    Attributes:
        points: the shared model, this rank's residual and its own point.
        exchange: how the updates of the last step have travelled.
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
        self.bucket, self._rescale = bucket, rescale
        self._schedule, self.exchange = exchange, exchange.at(0)
        self.points = ModelPoints(bucket)
        self._momentum = MomentumMask(bucket, context) if masking else None
        self.has_unsent_local_steps = False
        self._resting = RestingParameters(self.points)
        self._lr = math.nan

    # -- one exchange ------------------------------------------------------------------------------------

    @property
    def next_coefficient(self) -> Coefficient:
        """The coefficient of z after the exchange; 0: the parameters hold x itself."""
        return 0.0

    @property
    def is_apart(self) -> bool:
        """True if the parameters hold a point of this rank's own."""
        coefficient = self.points.coefficient
        return self.has_unsent_local_steps or isinstance(coefficient, Tensor) or coefficient != 0.0

    def start(self, step: int, lr: float) -> None:
        """Add what the wrapped optimizer has subtracted to the residual, encode, launch."""
        self.set_step(step)
        self.points.accumulate_update(self.next_coefficient, self.rescale_for_lr(lr))
        self.take_out_nonfinite()
        self.exchange.encode(self.points.residual.flat)
        self.exchange.launch()

    def take_out_nonfinite(self) -> None:
        """Leave no infinity or nan in the residual; it would stay there, and be sent again and again."""
        self.nonfinite = take_out(self.points.residual.flat, self.points.residual.views)

    def poison(self, flags: Tensor) -> None:
        """Put nan into the model where ``flags`` says that a rank's update was none, as the sum would have done."""
        poison(self.points.shared.views, flags)
        poison(self.points.local.views, flags)

    def set_step(self, step: int) -> None:
        """Prepare the exchange of ``step``."""
        self.exchange = self._schedule.at(step)
        if (former_shard_error := self.exchange.reshard()) is not None:
            self.points.residual.flat.add_(former_shard_error)
        self.exchange.set_step(step)
        self.exchange.hold(self.inactive)

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
        self.exchange.subtract_sent(self.points.residual.flat)
        self.exchange.add_aggregate(self.points.shared.flat, -1.0)
        self.exchange.commit()
        self.points.write_local_point()

    def mask_momentum(self) -> None:
        """Clear the wrapped optimizer's momentum where it was sent, if that is asked for."""
        if self._momentum is not None:
            self._momentum.clear(self.exchange.clear)

    # -- parameters that rest ----------------------------------------------------------------------------

    def set_inactive(self, inactive: frozenset[int]) -> None:
        """Let parameters rest; those that no longer do are placed at this rank's own point again."""
        points, ended = self.points, self.inactive - inactive
        self._resting.end(ended)
        for i in ended:
            x, e, z = points.views(i)
            detached_point(x, e, points.coefficient, z)
        self._resting.begin(inactive - self.inactive)
        super().set_inactive(inactive)
        self.exchange.hold(inactive)

    def _end_rest(self) -> None:
        """Let no parameter rest any more, and leave their own points, which may have been loaded, as they are."""
        self._resting.end(self.inactive)
        super().set_inactive(frozenset())
        self.exchange.hold(frozenset())

    # -- points and residual -----------------------------------------------------------------------------

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        if not self._resting:
            return self.points.shared.flat
        point = self.bucket.flat_buffer(self.bucket.state_dtype)
        torch._foreach_copy_(point.views, self._resting.shared().views)
        return point.flat

    def replica(self) -> list[Tensor]:
        return list(pieces(cast(Tensor, self.shared_point(self.exchange.context.comm)), self.bucket.layout.numels))

    def reset_to(self, point: Tensor) -> None:
        self.has_unsent_local_steps = False
        resting = self._resting.values()
        self.clear_residual()
        self.points.reset_to(point)
        self._resting.write(resting)

    def take_over(self, point: Optional[Tensor], pending: Optional[Tensor]) -> None:
        self._end_rest()
        coefficient = self.points.coefficient
        self.reset_to(self.points.shared.flat.clone() if point is None else point)
        if pending is not None:
            self.points.residual.flat.copy_(pending)
            self.points.coefficient = coefficient
            self.points.write_local_point()

    def residual_vector(self) -> Optional[Tensor]:
        server = self.exchange.server_error()
        return self.points.residual.flat if server is None else torch.cat((self.points.residual.flat, server.flat))

    def pending_update(self, lr: float) -> Optional[Tensor]:
        pending = self.points.residual.flat.clone()
        # Local steps, and what this rank has written into its parameters, are part of the next update.
        pending.add_(self.points.expected_local().to(pending.dtype).sub_(self.points.local.flat))
        server = self.exchange.server_pending()
        return pending if server is None else pending.add_(server)

    def clear_residual(self) -> None:
        self.points.residual.flat.zero_()
        self.exchange.clear_server_error()

    # -- checkpoints -------------------------------------------------------------------------------------

    def buffers(self) -> dict[str, FlatBuffer]:
        found = {
            "shared": self._resting.shared(),
            "residual": self._resting.residual(),
            **self.exchange.warm_start(),
        }
        if (server := self.exchange.server_error()) is not None:
            found["server"] = server
        # Local steps since the last exchange are nowhere but in the parameters.
        return {**found, "local": self.points.local} if self.has_unsent_local_steps else found

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "local_coefficient": float(self.points.coefficient),
            "lr": self._lr,
            "has_unsent_local_steps": self.has_unsent_local_steps,
            "dtype": str(self.bucket.dtype),
            "resting": self._resting.coefficients,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if "buffers" in saved:
            self._end_rest()
        self._lr, self.points.coefficient = float(saved["lr"]), float(saved["local_coefficient"])
        self.has_unsent_local_steps = bool(saved["has_unsent_local_steps"])
        if "buffers" in saved:
            points = self.points
            found, model = points.local.flat.clone(), points.shared.flat.clone()
            super().load_state_dict(saved)
            resting: Mapping[int, float] = saved.get("resting", {})
            if not self.has_unsent_local_steps:
                points.write_local_point()
                for i, coefficient in resting.items():
                    x, e, z = points.views(i)
                    detached_point(x, e, coefficient, z)
            if not points.is_at(found, points.local.flat):
                points.reset_to(model)
                points.local.flat.copy_(found)
            else:
                self._resting.load(resting)
                super().set_inactive(frozenset(resting))
                self.exchange.hold(self.inactive)

    def reset_to_model(self, overwritten: bool) -> None:
        """Be as a new state is, with the model in the parameters.

        Args:
            overwritten: whether a script has written into parameters since they were placed. These are the model's as
                they are; the others are where the shared model is.
        """
        points, changed = self.points, []
        if overwritten:
            placed = self.bucket.flat_buffer(self.bucket.dtype, points.expected_local())
            for i, (z, before) in enumerate(zip(points.local.views, placed.views)):
                moved = self.has_unsent_local_steps and i not in self.inactive
                if moved or not torch.equal(z, before):
                    changed.append(i)
        self._end_rest()
        for i in changed:
            x, _, z = points.views(i)
            x.copy_(z)
        self.reset()

    def reset(self) -> None:
        self._end_rest()
        self.has_unsent_local_steps = False
        self.clear_residual()
        self.points.reset_to(self.points.shared.flat)
        self._schedule.reset()
        self._lr = math.nan

    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        self._end_rest()
        names, points = self.bucket.layout.names, self.points
        points.coefficient = 0.0
        restored = all(name in parts and parts[name].shared is not None for name in names)
        if restored:
            found, model = points.local.flat.clone(), points.shared.flat.clone()
            saved_point = self.bucket.flat_buffer(self.bucket.dtype)
            for name, x, z in zip(names, points.shared.views, saved_point.views):
                x.copy_(cast(Tensor, parts[name].shared))
                z.copy_(cast(Tensor, parts[name].local))
            restored = points.is_at(found, saved_point.flat) or self._is_at_known(parts)
            if not restored:
                points.shared.flat.copy_(model)
            points.write_local_point()
        self.has_unsent_local_steps = False
        pending = {n: (p.pending, p.lr) for n, p in parts.items() if own and p.pending is not None and p.lr is not None}
        taken = add_to_views(points.residual, names, pending)
        if restored and len({parts[name].coefficient for name in names}) == 1:
            points.coefficient = parts[names[0]].coefficient
            points.write_local_point()
        return taken

    def _is_at_known(self, parts: Mapping[str, SavedParameter]) -> bool:
        """Return whether the parameters are at a point that one of the merged states was at."""
        names, places = self.bucket.layout.names, pieces(self.points.local.flat, self.bucket.layout.numels)
        return all(int(digest(z)) in parts[name].known for name, z in zip(names, places) if z.numel())
