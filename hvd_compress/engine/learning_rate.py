"""What turns a gradient into an update: each bucket's learning rate and loss scale, and when they are known."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch

from hvd_compress.algorithms.bucket_state import GradientState, Rate, State
from hvd_compress.bucket import Bucket
from hvd_compress.engine import grad_scaler as amp

# Optimizers whose update grows with the gradient: for these a change of learning rate changes what a
# residual in gradient units is worth.
GRADIENT_SCALED = (torch.optim.SGD, torch.optim.ASGD)


def scale_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's update does not grow with the gradient (Adam and its kin)."""
    return not isinstance(optimizer, GRADIENT_SCALED)


def group_of(optimizer: torch.optim.Optimizer, bucket: Bucket) -> dict[str, Any]:
    """A bucket's parameter group, or the first where it has parameters of several."""
    return optimizer.param_groups[max(bucket.group, 0)]


def learning_rate(optimizer: torch.optim.Optimizer, bucket: Bucket) -> float:
    """The learning rate of a bucket's parameter group; 1 for optimizers that have none, or choose it themselves."""
    lr = group_of(optimizer, bucket).get("lr")
    return 1.0 if lr is None else float(lr)


def rate_of(optimizer: torch.optim.Optimizer, state: State, scaler: Optional[Any]) -> Rate:
    """The rate of a bucket now; ``scaler`` is the GradScaler its gradients come from, if any."""
    scale = 1.0 if scaler is None else amp.loss_scale(scaler, optimizer)
    return Rate(learning_rate(optimizer, state.bucket), scale_free(optimizer), scale)


class Rates:
    """Whether the rates of one optimizer's buckets are known during backward.

    Work that waits for the learning rate may be done during backward only if the rate is set before. Scripts that
    set it between ``backward()`` and ``step()`` are noticed, and from then on such work waits for the step.
    """

    def __init__(self) -> None:
        self._early: dict[int, float] = {}
        self._come_late = False

    def early(
        self, index: int, optimizer: torch.optim.Optimizer, state: GradientState, scaler: Optional[Any]
    ) -> Optional[Rate]:
        """The rate of bucket ``index`` for work during backward; None if that must wait."""
        if self._come_late and state.has_residual:
            return None
        rate = rate_of(optimizer, state, scaler)
        self._early[index] = rate.lr
        return rate

    def check(self, optimizer: torch.optim.Optimizer, states: Sequence[State]) -> None:
        """Backward is over: were the rates that it went by those of the step?"""
        for index, lr in self._early.items():
            self._come_late |= learning_rate(optimizer, states[index].bucket) != lr
        self._early.clear()
