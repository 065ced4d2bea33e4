"""What is held back under unusual optimizers, rates and failures: it counts as what it would have been."""

from __future__ import annotations

import math
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import (
    close,
    flat,
    loss_of,
    mean_gradient,
    network,
    raises,
    same_everywhere,
    saved,
    sgd,
    shared,
    take_step,
    train,
    virtual,
    wrap,
)
from everything import BLOCK, LOSSY
from horovod.common.exceptions import HorovodInternalError
from torch import nn

from hvd_compress import DEF, EF, LIEC, BlockSign, Cast, Dense, LowRank, Policy, RandomK, TopK

RANKS = (2,)
FULL_RANKS = (1, 3)
HOLDS_GRADIENTS: tuple[Any, ...] = (EF(BLOCK), EF(TopK(0.25)), EF(BlockSign()), EF(LowRank(1)), LIEC(BLOCK, 100))


def check_maximizing_is_minimizing_the_negative() -> None:
    """Also where it ends: what is owed is added, not subtracted."""
    for compression in (*LOSSY, *HOLDS_GRADIENTS):
        for flushed in (False, True):
            found = []
            for sign in (1.0, -1.0):
                model = network(torch.float64)
                optimizer = wrap(model, sgd(model, momentum=0.9, maximize=sign < 0), compression)
                for t in range(6):
                    optimizer.zero_grad()
                    (sign * loss_of(model, hvd.rank(), t)).backward()
                    optimizer.step()
                if flushed:
                    optimizer.flush()
                found.append(flat(model) if flushed else virtual(model, optimizer))
            close(found[1], found[0], 1e-12, f"maximize with {compression}, flushed={flushed}")


def check_adam_flushes_by_a_step() -> None:
    """What a gradient is worth only Adam knows: whatever the loss is multiplied with, it moves as far."""
    for compression in (*HOLDS_GRADIENTS, Policy(EF(BLOCK), dense_dims=1)):
        moved = []
        for scale in (1.0, 1e4):
            model = network(torch.float64)
            optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30), compression)
            for t in range(5):
                optimizer.zero_grad()
                (scale * loss_of(model, hvd.rank(), t)).backward()
                optimizer.step()
            raises(
                RuntimeError,
                "point='virtual'",
                "Adam",
                f"rank {hvd.rank()}",
                call=lambda o=optimizer: o.consensus("virtual").__enter__(),
            )
            before = shared(model, optimizer)
            gradients = [p.grad for p in model.parameters()]
            optimizer.flush()
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
            same_everywhere(flat(model), f"flushed with {compression}")
            assert optimizer.stats().residual_norm == 0.0
            moved.append(flat(model) - before)
            assert 0 < float(moved[-1].abs().max()) < 0.1, f"{compression}: {moved[-1]}"
            at = flat(model)
            optimizer.flush()  # nothing is owed
            close(flat(model), at, 1e-14, f"flushed twice with {compression}")  # LIEC's mean of three may round
        close(moved[1], moved[0], 1e-6, f"the loss multiplied, {compression}")


def check_a_rate_of_zero_changes_no_debt() -> None:
    """What was sent at that step counts for nothing; what was not is owed as before, whatever rate comes."""
    for compression in (EF(BLOCK), EF(RandomK(0.25)), LIEC(BLOCK, 100)):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 6, lambda t: 0.1)
        before = shared(model, optimizer) - virtual(model, optimizer)
        for lr in (0.0, 1e-4):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            (0.0 * loss_of(model, hvd.rank(), 0)).backward()
            optimizer.step()
        after = shared(model, optimizer) - virtual(model, optimizer)
        kept = after != 0
        assert bool(kept.any()) or hvd.size() == 1, compression
        close(after[kept], before[kept], 1e-12, f"debts after a rate of 0 with {compression}")


def check_a_rate_set_between_backward_and_step() -> None:
    """One step goes by the old rate; then it is known that rates come late."""
    for compression in (EF(BLOCK), EF(TopK(0.25)), LIEC(BLOCK, 100)):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression)
        for t in range(12):
            before, mean = virtual(model, optimizer), mean_gradient(model, t)
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            lr = 0.1 / (1 + t)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            if t > 1:
                close(before - virtual(model, optimizer), lr * mean, 1e-10, f"step {t} with {compression}")


def check_groups_with_rates_of_their_own() -> None:
    """Each changes at steps of its own, and what is held back in it is owed at its own."""
    for compression in (EF(BLOCK), EF(TopK(0.25)), LIEC(BLOCK, 8)):
        model = network(torch.float64)
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
        optimizer = wrap(model, torch.optim.SGD(groups, lr=0.02), compression)
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        y = virtual(model, optimizer)
        for t in range(9):
            rates = (0.02, 0.002)[t // 3 % 2], (0.002, 0.03)[t // 2 % 2]
            for group, lr in zip(optimizer.param_groups, rates):
                group["lr"] = lr
            each = torch.cat([torch.full((n,), lr, dtype=torch.float64) for n, lr in zip(sizes, rates)])
            mean = mean_gradient(model, t)
            take_step(model, optimizer, t)
            after = virtual(model, optimizer)
            close(y - after, each * mean, 1e-10, f"step {t} with {compression}")
            y = after


def check_adam_takes_no_ratio() -> None:
    """All gradients are in what p.grad has been, or held back, whatever the rate has done."""
    model = network(torch.float64)
    optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.02), EF(BLOCK))
    total, seen = torch.zeros_like(flat(model)), torch.zeros_like(flat(model))
    for t in range(8):
        optimizer.param_groups[0]["lr"] = 0.02 if t < 4 else 0.002
        total += mean_gradient(model, t)
        take_step(model, optimizer, t)
        seen += torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    unit = next(iter(optimizer.state_dict()["hvd_compress"]["scalars"].values()))["unit"]
    held_back = hvd.allreduce(saved(optimizer, "residual") / unit, name="test.held")
    close(seen + held_back, total, 1e-12, "gradients")


def check_nothing_is_lost_by_a_failed_exchange() -> None:
    """Several passes: gradients meet the residual only when the exchange starts."""
    for compression in (EF(BLOCK), EF(TopK(0.25)), EF(LowRank(1))):
        for passes in (1, 2):
            model = network(torch.float64)
            optimizer = wrap(model, sgd(model), compression, backward_passes_per_step=passes)
            owed = torch.zeros_like(flat(model))
            start = flat(model)
            for t in range(6):
                batches = range(passes * t, passes * (t + 1))
                owed += mean_gradient(model, *batches)
                optimizer.zero_grad()
                for batch in batches:
                    loss_of(model, hvd.rank(), batch).backward()
                if t != 3:
                    optimizer.step()
                    continue
                exchange = optimizer._reducer.states[0]._exchange

                def fails(wait: Any = exchange.wait) -> None:
                    wait()
                    raise HorovodInternalError("as if a peer had failed")

                exchange.wait = fails
                raises(HorovodInternalError, "peer", call=optimizer.step)
                del exchange.wait
            close(start - virtual(model, optimizer), 0.1 * owed, 1e-10, f"{compression}, {passes} passes")


def check_float16_sums_and_the_predivide_factor() -> None:
    """Sums are kept in range as they are: divided before, small gradients would vanish with nobody to hold them."""
    for factor, size in ((0.25, 15000.0), (1024.0, 2e-5)):
        for compression in (EF(Cast()), DEF(Cast())):
            model = nn.Linear(3, 2).double()
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            before = flat(model)
            optimizer = wrap(model, sgd(model, lr=1.0), compression, gradient_predivide_factor=factor)
            for _ in range(20):
                optimizer.zero_grad()
                ((model.weight.sum() + model.bias.sum()) * size).backward()
                optimizer.step()
            wanted = torch.full_like(before, 20 * size)
            close(before - virtual(model, optimizer), wanted, 2e-3, f"{compression}, factor {factor}")


def check_an_infinity_shows() -> None:
    """It is no number to be paid off bit by bit, for ever."""
    for compression in (EF(Cast()), DEF(Cast())):
        model = nn.Linear(3, 2)
        optimizer = wrap(model, sgd(model), compression)
        (model.weight.sum() * math.inf).backward()
        optimizer.step()
        assert not bool(flat(model).isfinite().all()), compression


def check_a_step_left_out_for_a_nan() -> None:
    """Who looks at the gradients after ``synchronize()`` and leaves a bad step out is rid of it, sooner or later."""
    holding = (EF(BLOCK), EF(TopK(0.25)), EF(RandomK(0.25)), EF(BlockSign()), EF(Cast()))
    for compression in (Dense(), *holding, LIEC(), LIEC(BLOCK), LIEC(TopK(0.25))):
        model = network()
        optimizer = wrap(model, sgd(model, lr=0.01), compression)
        left_out = []
        for t in range(40):
            optimizer.zero_grad()
            loss = loss_of(model, hvd.rank(), t)
            (loss * math.nan if t == 3 and hvd.rank() == 0 else loss).backward()
            optimizer.synchronize()
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            worst = hvd.allreduce(torch.nan_to_num(norm * 0, nan=1.0), op=hvd.Sum, name="test.worst")
            if float(worst) > 0:
                left_out.append(t)
                optimizer.zero_grad()
                continue
            with optimizer.skip_synchronize():
                optimizer.step()
        assert left_out and left_out[0] >= 3 and left_out[-1] < 38, f"{compression}: left out {left_out}"
        with optimizer.consensus():
            assert bool(flat(model).isfinite().all()), compression
            same_everywhere(flat(model), f"after a nan with {compression}")


if __name__ == "__main__":
    harness.main(globals())
