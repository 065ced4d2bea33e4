"""DEF against its numpy reference: equality, mass identity, replicas, special cases."""

from __future__ import annotations

import itertools

import harness
import horovod.torch as hvd
import reference
import torch
from common import close, flat, joined, loss_of, network, same_everywhere, saved, train, wrap

from hvd_compress import DEF, Identity, RandomBlock

RANKS = (1, 4)
FULL_RANKS = (2, 3, 8)
MPI_RANKS = (2,)
STEPS = 200
BLOCK = RandomBlock(density=1 / 4, seed=3)
LOCALS = {
    "plain": reference.SGD,
    "momentum": lambda: reference.SGD(0.9),
    "decay": lambda: reference.SGD(0.9, 1e-2),
    "nesterov": lambda: reference.SGD(0.9, 1e-2, True),
}


def schedule(t: int) -> float:
    return 0.02 if t < STEPS // 2 else 0.002


def sgd(model: torch.nn.Module, kind: str) -> torch.optim.SGD:
    config = LOCALS[kind]()
    return torch.optim.SGD(
        model.parameters(),
        lr=schedule(0),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def compare(dtype: torch.dtype, tolerance: float, coefficient: float, kind: str, local_steps: int = 1) -> None:
    model = network(dtype)
    optimizer = wrap(model, sgd(model, kind), DEF(BLOCK, coefficient, local_steps=local_steps))

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
    close(saved(optimizer, "residual"), joined(run.e[hvd.rank()]), 100 * tolerance, f"e, {what}")
    with optimizer.consensus():
        close(flat(model), joined(run.x), tolerance, f"x, {what}")
    with optimizer.consensus("virtual"):
        y = {n: run.x[n] - reference.mean([e[n] for e in run.e]) for n in run.x}
        close(flat(model), joined(y), tolerance, f"y, {what}")
    close(flat(model), joined(run.z[hvd.rank()]), tolerance, f"z after consensus, {what}")


def check_equals_reference_float32() -> None:
    cases = itertools.product((0.0, 0.3, 1.0), LOCALS) if hvd.size() in (1, 4) else [(0.3, "nesterov"), (1.0, "decay")]
    for coefficient, kind in cases:
        compare(torch.float32, 1e-5, coefficient, kind)


def check_equals_reference_float64() -> None:
    for coefficient in (0.0, 0.3, 1.0):
        compare(torch.float64, 1e-12, coefficient, "nesterov")


def check_local_steps() -> None:
    compare(torch.float64, 1e-12, 0.3, "momentum", local_steps=3)


def check_mass_identity() -> None:
    """y_{t+1} = y_t - eta_t * mean_k m_k, with m_k read from the wrapped optimizer itself."""
    model = network()
    optimizer = wrap(model, sgd(model, "decay"), DEF(BLOCK, 0.3))
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
    optimizer = wrap(model, sgd(model, "nesterov"), DEF(BLOCK, 1.0))
    train(model, optimizer, STEPS, schedule)
    models = reference.local_sgd_with_block_averaging(hvd.size(), STEPS, BLOCK.selection, schedule, LOCALS["nesterov"])
    close(flat(model), joined(models[hvd.rank()]), 1e-12, "own model")


def check_density_one_is_data_parallel() -> None:
    run = reference.data_parallel(hvd.size(), STEPS, schedule, LOCALS["nesterov"])
    for compressor in (RandomBlock(density=1.0), Identity()):
        for coefficient in (0.0, 0.3, 1.0, "auto") if hvd.size() < 4 else (0.3,):
            model = network()
            optimizer = wrap(model, sgd(model, "nesterov"), DEF(compressor, coefficient))
            train(model, optimizer, STEPS, schedule)
            close(flat(model), joined(run.x), 1e-5, f"x with {compressor}, lambda={coefficient}")
            same_everywhere(flat(model), "z")


def check_one_rank_with_coefficient_one_is_the_wrapped_optimizer() -> None:
    if hvd.size() > 1:
        return
    model, plain = network(), network()
    optimizer = wrap(model, sgd(model, "nesterov"), DEF(BLOCK, 1.0))
    train(model, optimizer, STEPS, schedule)
    train(plain, sgd(plain, "nesterov"), STEPS, schedule)
    close(flat(model), flat(plain), 1e-6, "parameters")
    assert optimizer.stats().total_bytes_sent == 0


def check_auto_measures_the_best_coefficient() -> None:
    """lambda* = ||mean e||^2 / mean_k ||e_k||^2, here on the exchanged p: gathered and computed plainly."""
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model, "momentum"), DEF(Identity(), "auto"))
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
        with torch.no_grad():
            for name, p in twin.named_parameters():
                hvd.allreduce_(p, name=f"test.adam.{name}")
        close(flat(model), flat(twin), 1e-5, f"x at step {t}")


if __name__ == "__main__":
    harness.main(globals())
