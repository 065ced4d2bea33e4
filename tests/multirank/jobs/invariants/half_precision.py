"""float16 and bfloat16, as payloads and as parameters."""

from __future__ import annotations

import math
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    Cast,
    CountSketch,
    Dense,
    DistEF,
    GlobalSketch,
    LowRank,
    RandomBlock,
    RandomK,
    TopK,
)
from tests.multirank.support import reference
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.internals import residual_by_name
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference import joined
from tests.multirank.support.reference_checks import OPS, STEPS, nesterov, schedule_from_zero, torch_sgd
from tests.multirank.support.training import sgd, train, virtual_iterate, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
BLOCK = RandomBlock(density=1 / 4, seed=5)


def mean_loss(model: nn.Module) -> float:
    """Return the mean loss over all ranks' data of the first step."""
    return float(hvd.allreduce(loss_of(model, hvd.rank(), 0).detach().float(), name="test.loss"))


@cases(EF(Cast()), hvd.Compression.fp16)
def check_half_precision_payloads(compression: Any) -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule_from_zero, nesterov)
    model = network()
    optimizer = wrap(model, torch_sgd(model, nesterov()), compression)
    train(model, optimizer, STEPS, schedule_from_zero)
    same_everywhere(flat(model), "x")
    wanted = torch.from_numpy(joined(run.x)).to(flat(model).device)
    error = float((flat(model) - wanted).norm() / wanted.norm())
    assert error < 2e-3, (compression, error)
    expected = 2.0 if hvd.size() > 1 else 1.0
    assert abs(optimizer.stats().ratio - expected) < 1e-6


_ROUNDED: tuple[Any, ...] = (
    Dense(),
    hvd.Compression.fp16,
    EF(BlockSign()),
    LIEC(averaging_period=5),
    DEF(BLOCK),
    DistEF(),
)
_ROUNDED_FULL: tuple[Any, ...] = (
    EF(BLOCK),
    EF(Cast()),
    EF(RandomK(0.25)),
    EF(TopK(0.25)),
    EF(LowRank(1)),
    DEF(RandomK(0.25)),
    DEF(TopK(0.25), 0.0, masking=True),
    DEF(LowRank(1)),
    DEF(Cast()),
    GlobalSketch(CountSketch(density=1.0)),
)


@cases(
    compression=more_in_full(_ROUNDED, _ROUNDED_FULL),
    dtype=(torch.bfloat16, torch.float16),
)
def check_low_precision_parameters(compression: Any, dtype: torch.dtype) -> None:
    """Gradients have the parameters' dtype, residuals are float32, and x has the same bits on all ranks."""
    model = network(dtype)
    optimizer = wrap(model, torch_sgd(model, nesterov()), compression)
    first = mean_loss(model)
    train(model, optimizer, 60, lambda t: 0.01)
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    for tensor in residual_by_name(optimizer).values():
        assert tensor.dtype == torch.float32
    with optimizer.consensus():
        same_everywhere(flat(model).float(), f"x in {dtype} with {compression}")
        assert mean_loss(model) < first, f"{dtype} with {compression}"


@cases(first=(1e-5, 1e5))
def check_a_growing_rate_does_not_overflow_payloads(first: float) -> None:
    """Payloads have the size of gradients, however the learning rate has changed."""
    model = nn.Linear(3, 2).double()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=first), EF(Cast()))
    for t in range(12):
        optimizer.param_groups[0]["lr"] = first if t < 2 else 1.0
        before = flat(model)
        optimizer.zero_grad()
        ((model.weight.sum() + model.bias.sum()) * (3.0 if t >= 2 else 0.0)).backward()
        optimizer.step()
        if t >= 2:
            close(before - flat(model), torch.full_like(before, 3.0), 1e-3, f"step {t}, rate once {first}")
    assert optimizer.stats().residual_norm < 1e-2


@cases(compression=(EF(Cast()), DEF(Cast(), 0.0), DEF(Cast(), "auto")), op=OPS)
def check_sums_in_half_precision_stay_finite(compression: Any, op: Any) -> None:
    """Gradients whose sum float16 cannot hold are sent in parts: late, but completely."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    before = flat(model)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1.0), compression, op=op)
    for t in range(2 + 4 * hvd.size() ** (1 + (op == hvd.Sum))):
        optimizer.zero_grad()
        ((model.weight.sum() + model.bias.sum()) * (7e4 if t == 0 else 0.0)).backward()
        optimizer.step()
        assert torch.isfinite(flat(model)).all(), f"step {t} with {compression}, op={op}"
    factor = 1 if op == hvd.Average else hvd.size()
    with optimizer.consensus():
        close(before - flat(model), torch.full_like(before, 7e4 * factor), 2e-3, f"{compression}, op={op}")


@cases(compression=(EF(Cast()), DEF(Cast())), case={"large": (0.25, 15000.0), "small": (1024.0, 2e-5)})
def check_float16_sums_and_the_predivide_factor(compression: Any, case: tuple[float, float]) -> None:
    """The factor is not applied to payloads, where small gradients would vanish from sum and residual."""
    factor, size = case
    model = nn.Linear(3, 2).double()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    before = flat(model)
    optimizer = wrap(model, sgd(model, lr=1.0), compression, gradient_predivide_factor=factor)
    for _ in range(20):
        optimizer.zero_grad()
        ((model.weight.sum() + model.bias.sum()) * size).backward()
        optimizer.step()
    wanted = torch.full_like(before, 20 * size)
    close(before - virtual_iterate(model, optimizer), wanted, 2e-3, f"{compression}, factor {factor}")


@cases(EF(Cast()), DEF(Cast()))
def check_an_infinity_shows(compression: Any) -> None:
    """Error feedback could never send all of an infinity: the parameters must show it at once."""
    model = nn.Linear(3, 2)
    optimizer = wrap(model, sgd(model), compression)
    (model.weight.sum() * math.inf).backward()
    optimizer.step()
    assert not bool(flat(model).isfinite().all()), compression


def check_bfloat16_gradients_beyond_float16() -> None:
    model = nn.Linear(4, 3).bfloat16()
    optimizer = wrap(model, sgd(model), Dense())
    (model.weight.sum() * 1e5 + model.bias.sum() * 1e5).backward()
    optimizer.synchronize()
    assert all(p.grad is not None and bool((p.grad == torch.tensor(1e5).bfloat16()).all()) for p in model.parameters())
