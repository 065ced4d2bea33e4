"""DEF equals its numpy reference; mass identity, special cases, the measured coefficient."""

from __future__ import annotations

import itertools
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, Identity, RandomBlock
from tests.multirank.support import reference
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import FULL, Job, PerJob, cases, only
from tests.multirank.support.internals import residual
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference import joined
from tests.multirank.support.reference_checks import torch_sgd
from tests.multirank.support.training import train, wrap

RANKS = (1, 4)
FULL_RANKS = (2, 3, 8)
MPI_RANKS = (2,)
STEPS = 200 if FULL else 60
BLOCK = RandomBlock(density=1 / 4, seed=3)
LOCALS = {
    "plain": reference.SGD,
    "momentum": lambda: reference.SGD(0.9),
    "decay": lambda: reference.SGD(0.9, 1e-2),
    "nesterov": lambda: reference.SGD(0.9, 1e-2, True),
}


def schedule(t: int) -> float:
    """Return the learning rate of step ``t``."""
    return 0.02 if t < STEPS // 2 else 0.002


def wrapped(model: torch.nn.Module, kind: str, algorithm: DEF) -> Any:
    """Return our optimizer around SGD with the settings of that kind."""
    return wrap(model, torch_sgd(model, LOCALS[kind]()), algorithm)


def compare(dtype: torch.dtype, tolerance: float, coefficient: float, kind: str, local_steps: int = 1) -> None:
    """Compare x at every step, and z, e and y after training, with the reference."""
    model = network(dtype)
    optimizer = wrapped(model, kind, DEF(BLOCK, coefficient, local_steps=local_steps))
    history: list[torch.Tensor] = []

    def remember(t: int) -> None:
        with optimizer.consensus():
            history.append(flat(model))

    train(model, optimizer, STEPS * local_steps, lambda t: schedule(t // local_steps), after_step=remember)
    same_everywhere(torch.cat(history), "x at some step")
    run = reference.detached(
        hvd.size(), STEPS, coefficient, BLOCK.selection, schedule, LOCALS[kind], local_steps=local_steps
    )
    what = f"{dtype} lambda={coefficient} {kind} H={local_steps}"
    close(flat(model), joined(run.z[hvd.rank()]), tolerance, f"z, {what}")
    close(residual(optimizer), joined(run.e[hvd.rank()]), 100 * tolerance, f"e, {what}")
    with optimizer.consensus():
        close(flat(model), joined(run.x), tolerance, f"x, {what}")
    with optimizer.consensus("virtual"):
        y = {n: run.x[n] - reference.mean([e[n] for e in run.e]) for n in run.x}
        close(flat(model), joined(y), tolerance, f"y, {what}")
    close(flat(model), joined(run.z[hvd.rank()]), tolerance, f"z after consensus, {what}")


def settings(job: Job) -> dict[str, tuple[float, str]]:
    """Return coefficients and kinds of SGD: all at one rank and, in the full run, at four; two of them at others."""
    every = itertools.product((0.0, 0.3, 1.0), LOCALS)
    chosen = every if job.ranks == 1 or (job.ranks == 4 and job.full) else [(0.3, "nesterov"), (1.0, "decay")]
    return {f"coefficient={coefficient}, {kind}": (coefficient, kind) for coefficient, kind in chosen}


@cases(PerJob(settings))
def check_equals_reference_float32(case: tuple[float, str]) -> None:
    compare(torch.float32, 1e-5, *case)


@cases(coefficient=(0.0, 0.3, 1.0))
def check_equals_reference_float64(coefficient: float) -> None:
    compare(torch.float64, 1e-12, coefficient, "nesterov")


def check_local_steps() -> None:
    compare(torch.float64, 1e-12, 0.3, "momentum", local_steps=3)


def check_mass_identity() -> None:
    """y_{t+1} = y_t - eta_t * mean_k m_k, with m_k read from the wrapped optimizer."""
    model = network()
    optimizer = wrapped(model, "decay", DEF(BLOCK, 0.3))
    with optimizer.consensus("virtual"):
        before = [flat(model).double()]

    def identity(t: int) -> None:
        step = torch.cat([optimizer.state[p]["momentum_buffer"].reshape(-1) for p in model.parameters()])
        direction = hvd.allreduce(step.double(), name="test.direction")
        with optimizer.consensus("virtual"):
            after = flat(model).double()
        close(after, before[0] - schedule(t) * direction, 3e-7, f"y at step {t}")
        before[0] = after

    train(model, optimizer, STEPS if hvd.size() < 4 else 40, schedule, after_step=identity)


def check_coefficient_one_is_local_sgd_with_block_averaging() -> None:
    model = network(torch.float64)
    optimizer = wrapped(model, "nesterov", DEF(BLOCK, 1.0))
    train(model, optimizer, STEPS, schedule)
    models = reference.local_sgd_with_block_averaging(hvd.size(), STEPS, BLOCK.selection, schedule, LOCALS["nesterov"])
    close(flat(model), joined(models[hvd.rank()]), 1e-12, "own model")


@cases(
    compressor=(RandomBlock(density=1.0), Identity()),
    coefficient=PerJob(lambda job: (0.0, 0.3, 1.0, "auto") if job.ranks < 4 else (0.3,)),
)
def check_density_one_is_data_parallel(compressor: Any, coefficient: Any) -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule, LOCALS["nesterov"])
    model = network()
    optimizer = wrapped(model, "nesterov", DEF(compressor, coefficient))
    train(model, optimizer, STEPS, schedule)
    close(flat(model), joined(run.x), 1e-5, f"x with {compressor}, lambda={coefficient}")
    same_everywhere(flat(model), "z")


@only(lambda job: job.ranks == 1)
def check_one_rank_with_coefficient_one_is_the_wrapped_optimizer() -> None:
    model, plain = network(), network()
    optimizer = wrapped(model, "nesterov", DEF(BLOCK, 1.0))
    train(model, optimizer, STEPS, schedule)
    train(plain, torch_sgd(plain, LOCALS["nesterov"]()), STEPS, schedule)
    close(flat(model), flat(plain), 1e-6, "parameters")
    assert optimizer.stats().total_bytes_sent == 0


def check_auto_measures_the_best_coefficient() -> None:
    """The coefficient is ||mean p||^2 / mean_k ||p_k||^2 of the exchanged p, here gathered from all ranks."""
    model = network(torch.float64)
    optimizer = wrapped(model, "momentum", DEF(Identity(), "auto"))
    square_mean = mean_square = 0.0

    def measure(t: int) -> None:
        nonlocal square_mean, mean_square
        # Everything is exchanged, so p_k is this step's update.
        p = torch.cat([optimizer.state[q]["momentum_buffer"].reshape(-1) for q in model.parameters()]) * schedule(t)
        every = hvd.allgather(p.reshape(1, -1), name="test.p")
        square_mean = 0.9 * square_mean + 0.1 * float(every.mean(0).square().sum())
        mean_square = 0.9 * mean_square + 0.1 * float(every.square().sum(1).mean())
        assert abs(optimizer.stats().coefficient - square_mean / mean_square) < 1e-9

    train(model, optimizer, 50, schedule, after_step=measure)
    expected = 1.0 if hvd.size() == 1 else optimizer.stats().coefficient
    assert 0.0 < expected <= 1.0
    assert hvd.size() == 1 or expected < 0.999, "ranks with different data should disagree"


def check_any_wrapped_optimizer() -> None:
    """AdamW at density 1 is data-parallel in the updates: x moves by the mean of the local updates."""
    model = network()
    optimizer = wrap(model, torch.optim.AdamW(model.parameters(), lr=1e-2), DEF(Identity(), 0.3))
    twin = network()
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for t in range(30):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(twin, hvd.rank(), t).backward()
        plain.step()
        for name, p in twin.named_parameters():
            hvd.allreduce_(p.detach(), name=f"test.adam.{name}")
        close(flat(model), flat(twin), 1e-5, f"x at step {t}")
