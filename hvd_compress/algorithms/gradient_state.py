"""The state of an algorithm that exchanges gradients, before the wrapped optimizer steps."""

from __future__ import annotations

import abc
from typing import Any, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import BucketState, Rate, SavedParameter, add_to_views
from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Communicator

# With momentum the residual of gradients grows this many times at most when the learning rate falls.
FALL = 10.0
# Elements below which the call of an operation during backward costs more than the memory traffic that it saves.
SMALL = 2**13


class GradientState(BucketState):
    """Exchanges gradients: ``accumulate_grad`` and ``start`` may run during backward, ``finish`` in ``synchronize()``.

    A step is a transaction. Until ``commit``, which comes just before the wrapped optimizer steps with the results,
    everything that the next step depends on is as it was before the first gradient; ``discard_step`` gives the step up.

    Attributes:
        has_residual: whether a gradient may count at later steps: then also a parameter without one has a result.
        residual_lr: learning rate at which the residual is an update; None: the rate of the step it is sent at.
        largest_lr: the largest learning rate so far.
    """

    has_residual: bool = True
    residual_lr: Optional[float] = None
    largest_lr: float = 0.0
    _step_lr: Optional[float] = None
    _step_largest: float = 0.0

    def accumulate_grad(self, index: int, gradient: Tensor, rate: Rate) -> Optional[Tensor]:
        """Take the final gradient of the bucket's parameter ``index`` while it is still in the cache.

        Returns:
            None if this state waits for ``start``; else what becomes ``p.grad``, of undefined content until
            ``finish``.
        """
        return None

    @abc.abstractmethod
    def discard_step(self) -> None:
        """Forget that the step has begun, perhaps also finished: its results are not used."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Wait for what ``start`` has launched, on all ranks, and make no use of it."""

    @abc.abstractmethod
    def start(self, step: int, gradients: Sequence[Optional[Tensor]], rate: Rate) -> None:
        """Compensate, encode, launch; a gradient that is missing counts as zeros."""

    @abc.abstractmethod
    def finish(self) -> list[Tensor]:
        """Wait, and return what ``p.grad`` shall be, for each parameter of the bucket."""

    def commit(self) -> None:
        """Remember what this step has changed: the wrapped optimizer steps with its results."""
        self.residual_lr, self.largest_lr = self._step_lr, self._step_largest

    def reset(self) -> None:
        self.discard_step()
        self.set_inactive(frozenset())
        self.clear_residual()
        self.residual_lr, self.largest_lr = None, 0.0

    def residual_rescale(self, rate: Rate, rescale: bool) -> float:
        """Return the factor that keeps the residual's update as it was at the rate of this step.

        A rate of 0 is passed over: the residual counts at the last positive one. With momentum a rate below a tenth of
        the largest one so far counts as that tenth. Else, at the end of a schedule that goes down to nothing, gradients
        thousands of times too large would get into the momentum, and a warm restart would multiply them by its rate.

        Args:
            rescale: the algorithm's ``rescale_residual``; False: the factor is always 1.
        """
        self._step_lr, self._step_largest = self.residual_lr, self.largest_lr
        if not rescale or rate.scale_free:
            self._step_lr = None
        elif rate.lr > 0:
            self._step_largest = max(self.largest_lr, rate.lr)
            self._step_lr = max(rate.lr, self._step_largest / FALL) if rate.momentum else rate.lr
            return self.residual_lr / self._step_lr if self.residual_lr else 1.0
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "residual_lr": self.residual_lr, "largest_lr": self.largest_lr}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.residual_lr = saved["residual_lr"]
        self.largest_lr = saved.get("largest_lr", self.residual_lr or 0.0)  # older states of this format do not say

    def pending_buffer(self) -> Optional[FlatBuffer]:
        """Return the buffer that joins the next gradient, or None if this state has no residual."""
        return None

    def restore(self, parts: Mapping[str, SavedParameter], own: bool) -> set[str]:
        self.set_inactive(frozenset())
        self.clear_residual()
        names = self.bucket.layout.names
        pending = {n: parts[n] for n in names if n in parts and parts[n].pending is not None} if own else {}
        buffer = self.pending_buffer() if pending else None
        if buffer is None:
            return set()
        # The residual keeps the rate of the first parameter, so that a state of one rate is restored without rounding.
        self.residual_lr = next((part.lr for part in pending.values() if part.lr), self.residual_lr)
        self.largest_lr = max([self.largest_lr, *(part.largest_lr for part in pending.values())])
        values = {}
        for name, part in pending.items():
            assert part.pending is not None
            factor = part.lr / self.residual_lr if part.lr and self.residual_lr else 1.0
            values[name] = part.pending, factor
        return add_to_views(buffer, names, values)

    @abc.abstractmethod
    def pending_gradient(self) -> Optional[Tensor]:
        """Return a new flat vector whose mean over ranks the aggregates still lack, in ``p.grad``'s units, or None."""

    def pending_update(self, lr: float) -> Optional[Tensor]:
        pending = self.pending_gradient()
        return None if pending is None else pending.mul_(lr if self.residual_lr is None else self.residual_lr)

    def shared_point(self, comm: Communicator) -> Optional[Tensor]:
        return None

    def replica(self) -> list[Tensor]:
        return [p.data.contiguous().view(-1) for p in self.bucket.parameters]

    def reset_to(self, point: Tensor) -> None:
        self.bucket.write_params(point, self.inactive)
        self.clear_residual()

    def _active(self, flat: Tensor) -> Tensor:
        """Return a copy of ``flat`` with zeros for the parameters that rest."""
        copy = self.bucket.flat_buffer(self.bucket.state_dtype, flat.clone())
        for i in self.inactive:
            copy.views[i].zero_()
        return copy.flat

    def take_over(self, point: Optional[Tensor], pending: Optional[Tensor]) -> None:
        self.discard_step()
        self.set_inactive(frozenset())
        self.clear_residual()
        if point is not None:
            with torch.no_grad():
                self.bucket.write_params(point)
        buffer = self.pending_buffer() if pending is not None else None
        if buffer is not None and pending is not None:
            buffer.flat.copy_(pending)
