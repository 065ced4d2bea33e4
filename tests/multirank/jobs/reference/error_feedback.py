"""EF and Dense equal their numpy references."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import EF, Dense, Identity, RandomBlock
from tests.multirank.support import reference
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import residual
from tests.multirank.support.networks import flat, network
from tests.multirank.support.reference import joined
from tests.multirank.support.reference_checks import STEPS, nesterov, schedule_from_zero, torch_sgd
from tests.multirank.support.training import mean_gradient, sgd, take_step, train, virtual_iterate, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
BLOCK = RandomBlock(density=1 / 4, seed=5)


@cases(dtype=(torch.float32, torch.float64), rescale=(True, False))
def check_equals_reference(dtype: torch.dtype, rescale: bool) -> None:
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    model = network(dtype)
    optimizer = wrap(model, torch_sgd(model, nesterov()), EF(BLOCK, rescale_residual=rescale))
    history: list[torch.Tensor] = []
    train(model, optimizer, STEPS, schedule_from_zero, after_step=lambda t: history.append(flat(model)))
    same_everywhere(torch.cat(history), "parameters at some step")
    run = reference.error_feedback(hvd.size(), STEPS, BLOCK.selection, schedule_from_zero, nesterov, rescale)
    close(flat(model), joined(run.x), tolerance, f"x, {dtype}, rescale={rescale}")
    close(residual(optimizer), joined(run.e[hvd.rank()]), 100 * tolerance, f"e, {dtype}, {rescale}")


def check_mass_identity() -> None:
    """Without momentum: y = x - eta * mean e obeys y_{t+1} = y_t - eta_t * mean_k g_k."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model, lr=0.02), EF(BLOCK))

    def rate(t: int) -> float:
        return 0.02 if t < STEPS // 2 else 0.002

    after = flat(model)
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(t)
        # The residual keeps its value as an update: a change of the rate alone does not move y.
        before = virtual_iterate(model, optimizer)
        if t > 0:
            close(before, after, 1e-14, f"y after the rate has been set for step {t}")
        mean = mean_gradient(model, t)
        take_step(model, optimizer, t)
        after = virtual_iterate(model, optimizer)
        close(after, before - rate(t) * mean, 1e-13, f"y at step {t}")


@cases(Dense(), EF(Identity()), EF(RandomBlock(1.0)), hvd.Compression.none)
def check_dense_and_identity_are_data_parallel(compression: Any) -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule_from_zero, nesterov)
    model = network()
    train(model, wrap(model, torch_sgd(model, nesterov()), compression), STEPS, schedule_from_zero)
    close(flat(model), joined(run.x), 1e-5, f"x with {compression}")
    same_everywhere(flat(model), "x")
