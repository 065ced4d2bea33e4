"""The factors between a gradient and its update: learning rate and loss scale, and when they are known."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch

from hvd_compress.algorithms.bucket_state import Rate
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.bucket import Bucket
from hvd_compress.engine import grad_scaler

# Optimizers whose update grows with the gradient: for these a change of learning rate changes the update that a
# residual in gradient units makes.
GRADIENT_SCALED = (torch.optim.SGD, torch.optim.ASGD)


def scale_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer's update does not grow with the gradient (Adam and its kin)."""
    return not isinstance(optimizer, GRADIENT_SCALED)


def group_of(optimizer: torch.optim.Optimizer, bucket: Bucket) -> dict[str, Any]:
    """Return the parameter group of a bucket's last parameter; {} if it has been taken out of the optimizer."""
    parameter, groups = bucket.parameters[-1], optimizer.param_groups
    index, position = bucket.place
    seen = groups[index]["params"] if index < len(groups) else []
    if position < len(seen) and seen[position] is parameter:
        return groups[index]
    for index, group in enumerate(groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is parameter:
                bucket.place = (index, position)
                return group
    return {}


def learning_rate(optimizer: torch.optim.Optimizer, bucket: Bucket) -> float:
    """Return the learning rate of a bucket's parameter group; 1 for optimizers that have none, or choose it."""
    lr = group_of(optimizer, bucket).get("lr")
    return 1.0 if lr is None else float(lr)


def rate_of(optimizer: torch.optim.Optimizer, bucket: Bucket, scaler: Optional[Any]) -> Rate:
    """Return the present rate of a bucket; ``scaler`` is the GradScaler its gradients come from, if any."""
    scale = 1.0 if scaler is None else grad_scaler.loss_scale(scaler, optimizer)
    momentum = bool(group_of(optimizer, bucket).get("momentum"))
    return Rate(learning_rate(optimizer, bucket), scale_free(optimizer), scale, momentum)


class RatesInBackward:
    """Learning rates that were used during backward, and whether the script has changed them before the step.

    Work that needs the learning rate may be done during backward only if the rate is set before. Scripts that
    set it between ``backward()`` and ``step()`` are noticed, and from then on such work waits for the step.
    """

    def __init__(self) -> None:
        self._used: dict[int, Rate] = {}  # of this step, by bucket
        self._lr_set_late = False

    def rate_in_backward(
        self, index: int, optimizer: torch.optim.Optimizer, state: GradientState, scaler: Optional[Any]
    ) -> Optional[Rate]:
        """Return the rate of bucket ``index`` for work during backward; None if that must wait for the step."""
        if self._lr_set_late and state.has_residual:
            return None
        if index not in self._used:
            self._used[index] = rate_of(optimizer, state.bucket, scaler)
        return self._used[index]

    def note_step_rate(self, optimizer: torch.optim.Optimizer, states: Sequence[GradientState]) -> None:
        """Compare the rates that backward has used with those of the step."""
        for index, rate in self._used.items():
            self._lr_set_late |= learning_rate(optimizer, states[index].bucket) != rate.lr
        self._used.clear()

    def forget(self) -> None:
        """Forget the rates of a step that was given up."""
        self._used.clear()
