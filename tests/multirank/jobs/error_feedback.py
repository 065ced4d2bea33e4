"""EF and Dense against their numpy references."""

from __future__ import annotations

import harness
import horovod.torch as hvd
import reference
import torch
from common import (
    close,
    flat,
    joined,
    loss_of,
    mean_gradient,
    network,
    same_everywhere,
    saved,
    take_step,
    train,
    virtual,
    wrap,
)
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
    Identity,
    LowRank,
    RandomBlock,
    RandomK,
    TopK,
)

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
STEPS = 100
BLOCK = RandomBlock(density=1 / 4, seed=5)


def schedule(t: int) -> float:
    return 0.0 if t == 0 else 0.02 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def sgd(model: torch.nn.Module, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum, weight_decay=1e-2, nesterov=momentum > 0)


def check_equals_reference() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for rescale in (True, False):
            model = network(dtype)
            optimizer = wrap(model, sgd(model), EF(BLOCK, rescale_residual=rescale))
            history = []
            train(model, optimizer, STEPS, schedule, after_step=lambda t: history.append(flat(model)))  # noqa: B023
            same_everywhere(torch.cat(history), "parameters at some step")
            run = reference.error_feedback(
                hvd.size(), STEPS, BLOCK.selection, schedule, lambda: reference.SGD(0.9, 1e-2, True), rescale
            )
            close(flat(model), joined(run.x), tolerance, f"x, {dtype}, rescale={rescale}")
            unit = next(iter(optimizer.state_dict()["hvd_compress"]["scalars"].values()))["unit"]
            residual = saved(optimizer, "residual") / unit
            close(residual, joined(run.e[hvd.rank()]), 100 * tolerance, f"e, {dtype}, {rescale}")


def check_mass_identity() -> None:
    """Without momentum: y = x - eta * mean e obeys y_{t+1} = y_t - eta_t * mean_k g_k."""
    model = network(torch.float64)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.02), EF(BLOCK))

    def rate(t: int) -> float:
        return 0.02 if t < STEPS // 2 else 0.002

    after = flat(model)
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(t)
        # The residual is owed in update units: a change of the rate alone does not move y.
        before = virtual(model, optimizer)
        if t > 0:
            close(before, after, 1e-14, f"y after the rate has been set for step {t}")
        mean = mean_gradient(model, t)
        take_step(model, optimizer, t)
        after = virtual(model, optimizer)
        close(after, before - rate(t) * mean, 1e-13, f"y at step {t}")


def check_dense_and_identity_are_data_parallel() -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule, lambda: reference.SGD(0.9, 1e-2, True))
    for compression in (Dense(), EF(Identity()), EF(RandomBlock(1.0)), hvd.Compression.none):
        model = network()
        train(model, wrap(model, sgd(model), compression), STEPS, schedule)
        close(flat(model), joined(run.x), 1e-5, f"x with {compression}")
        same_everywhere(flat(model), "x")


def check_half_precision_on_the_wire() -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule, lambda: reference.SGD(0.9, 1e-2, True))
    errors = {}
    for name, compression in {"ef": EF(Cast()), "none": hvd.Compression.fp16}.items():
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, STEPS, schedule)
        same_everywhere(flat(model), "x")
        wanted = torch.from_numpy(joined(run.x))
        errors[name] = float((flat(model) - wanted).norm() / wanted.norm())
        assert errors[name] < 2e-3, (name, errors)
        expected = 2.0 if hvd.size() > 1 else 1.0
        assert abs(optimizer.stats().ratio - expected) < 1e-6


def mean_loss(model: nn.Module) -> float:
    """Over all ranks' data of the first step."""
    return float(hvd.allreduce(loss_of(model, hvd.rank(), 0).detach().float(), name="test.loss"))


def check_low_precision_parameters() -> None:
    """bfloat16 and float16 parameters: gradients in their dtype, residual in float32, same bits everywhere."""
    for dtype in (torch.bfloat16, torch.float16):
        gradients = (
            Dense(),
            EF(BLOCK),
            EF(Cast()),
            hvd.Compression.fp16,
            EF(RandomK(0.25)),
            EF(TopK(0.25)),
            EF(BlockSign()),
            EF(LowRank(1)),
            LIEC(averaging_period=5),
        )
        updates = (
            DEF(BLOCK),
            DEF(RandomK(0.25)),
            DEF(TopK(0.25), 0.0, masking=True),
            DistEF(),
            DEF(LowRank(1)),
            DEF(Cast()),
            GlobalSketch(CountSketch(density=1.0)),
        )
        for compression in (*gradients, *updates):
            model = network(dtype)
            optimizer = wrap(model, sgd(model), compression)
            first = mean_loss(model)
            train(model, optimizer, 60, lambda t: 0.01)
            assert all(p.grad.dtype == dtype for p in model.parameters())
            for tensor in optimizer.state_dict()["hvd_compress"]["buffers"].get("residual", {}).values():
                assert tensor.dtype == torch.float32
            with optimizer.consensus():
                same_everywhere(flat(model).float(), f"x in {dtype} with {compression}")
                assert mean_loss(model) < first, f"{dtype} with {compression}"


def check_a_rate_that_grows_does_not_fill_half_precision() -> None:
    """Payloads are of the gradients' size whatever the learning rate has become since it began."""
    for first in (1e-5, 1e5):
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


def check_sums_in_half_precision_stay_finite() -> None:
    """Gradients that float16 cannot add up are sent bit by bit: late, but whole."""
    for compression in (EF(Cast()), DEF(Cast(), 0.0), DEF(Cast(), "auto")):
        for op in (hvd.Average, hvd.Sum):
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


if __name__ == "__main__":
    harness.main(globals())
