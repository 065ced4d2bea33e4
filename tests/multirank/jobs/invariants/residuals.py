"""Residuals under changing rates, Adam and failures: no gradient in them is lost or changes its weight."""

from __future__ import annotations

import math
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_compress import EF, LIEC, BlockSign, Cast, Dense, LowRank, RandomK, TopK
from tests.multirank.support.algorithm_cases import BLOCK
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import failing_exchange, residual
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import (
    local_gradient,
    mean_gradient,
    sgd,
    shared_model,
    take_step,
    train,
    virtual_iterate,
    wrap,
)

RANKS = (2,)
FULL_RANKS = (1, 3)


@cases(EF(BLOCK), EF(RandomK(0.25)), LIEC(BLOCK, 100))
def check_a_rate_of_zero_changes_no_residual(compression: Any) -> None:
    """The payload of that step has no effect; the rest of the residual does not change, whatever rate follows."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), compression)
    train(model, optimizer, 6, lambda t: 0.1)
    before = shared_model(model, optimizer) - virtual_iterate(model, optimizer)
    for lr in (0.0, 1e-4):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (0.0 * loss_of(model, hvd.rank(), 0)).backward()
        optimizer.step()
    after = shared_model(model, optimizer) - virtual_iterate(model, optimizer)
    kept = after != 0
    assert bool(kept.any()) or hvd.size() == 1, compression
    close(after[kept], before[kept], 1e-12, f"pending update after a rate of 0 with {compression}")


@cases(EF(BLOCK), EF(TopK(0.25)), LIEC(BLOCK, 100))
def check_a_rate_set_between_backward_and_step(compression: Any) -> None:
    """The first such step is exchanged at the former rate; then the optimizer expects late rates."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), compression)
    for t in range(12):
        before, mean = virtual_iterate(model, optimizer), mean_gradient(model, t)
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        lr = 0.1 / (1 + t)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if t > 1:
            close(before - virtual_iterate(model, optimizer), lr * mean, 1e-10, f"step {t} with {compression}")


@cases(EF(BLOCK), EF(TopK(0.25)), LIEC(BLOCK, 8))
def check_groups_with_rates_of_their_own(compression: Any) -> None:
    """Rates of groups change at different steps, and each group's residual is rescaled by its own."""
    model = network(torch.float64)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = wrap(model, torch.optim.SGD(groups, lr=0.02), compression)
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    y = virtual_iterate(model, optimizer)
    for t in range(9):
        rates = (0.02, 0.002)[t // 3 % 2], (0.002, 0.03)[t // 2 % 2]
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr
        each = torch.cat([torch.full((n,), lr, dtype=torch.float64) for n, lr in zip(sizes, rates)])
        mean = mean_gradient(model, t)
        take_step(model, optimizer, t)
        after = virtual_iterate(model, optimizer)
        close(y - after, each * mean, 1e-10, f"step {t} with {compression}")
        y = after


def check_residuals_of_adam_are_not_rescaled() -> None:
    """The sum of p.grad and the residual is the sum of all gradients, whatever the rate."""
    model = network(torch.float64)
    optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.02), EF(BLOCK))
    total, seen = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
    for t in range(8):
        optimizer.param_groups[0]["lr"] = 0.02 if t < 4 else 0.002
        total += mean_gradient(model, t)
        take_step(model, optimizer, t)
        seen += local_gradient(model)
    mean_residual = hvd.allreduce(residual(optimizer), name="test.residual")
    close(seen + mean_residual, total, 1e-12, "gradients")


@cases(compression=(EF(BLOCK), EF(TopK(0.25)), EF(LowRank(1))), passes=(1, 2))
def check_a_step_whose_exchange_fails_has_not_been(compression: Any, passes: int) -> None:
    """Its gradients count for nothing, and the residual is as it was, to the bit."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), compression, backward_passes_per_step=passes)
    total = torch.zeros_like(flat(model))
    start = flat(model)
    for t in range(6):
        batches = range(passes * t, passes * (t + 1))
        gradient = mean_gradient(model, *batches)
        optimizer.zero_grad()
        for batch in batches:
            loss_of(model, hvd.rank(), batch).backward()
        if t != 3:
            total += gradient
            optimizer.step()
            continue
        before, steps = residual(optimizer), optimizer.stats().steps
        with failing_exchange(optimizer, HorovodInternalError("as if a peer had failed")):
            raises(HorovodInternalError, "peer", call=optimizer.step)
        assert torch.equal(residual(optimizer), before)
        assert optimizer.stats().steps == steps
    close(start - virtual_iterate(model, optimizer), 0.1 * total, 1e-10, f"{compression}, {passes} passes")


@cases(
    Dense(),
    EF(BLOCK),
    EF(TopK(0.25)),
    EF(RandomK(0.25)),
    EF(BlockSign()),
    EF(Cast()),
    LIEC(),
    LIEC(BLOCK),
    LIEC(TopK(0.25)),
)
def check_steps_skipped_for_a_nan(compression: Any) -> None:
    """A script that skips steps whose gradients are nan after ``synchronize()`` gets rid of the nan."""
    model = network()
    optimizer = wrap(model, sgd(model, lr=0.01), compression)
    skipped = []
    for t in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), t)
        (loss * math.nan if t == 3 and hvd.rank() == 0 else loss).backward()
        optimizer.synchronize()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        worst = hvd.allreduce(torch.nan_to_num(norm * 0, nan=1.0), op=hvd.Sum, name="test.worst")
        if float(worst) > 0:
            skipped.append(t)
            optimizer.zero_grad()
            continue
        with optimizer.skip_synchronize():
            optimizer.step()
    assert skipped and skipped[0] >= 3 and skipped[-1] < 38, f"{compression}: skipped {skipped}"
    with optimizer.consensus():
        assert bool(flat(model).isfinite().all()), compression
        same_everywhere(flat(model), f"after a nan with {compression}")
