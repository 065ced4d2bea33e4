"""What the jobs that compare algorithms with flat numpy references share."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import reference
import reference_flat as plain
import torch
from common import close, flat, joined, loss_of, network, same_everywhere, train, wrap
from everything import FULL

from hvd_compress import LIEC

STEPS = 100


def schedule(t: int) -> float:
    return 0.02 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def nesterov() -> reference.SGD:
    return reference.SGD(0.9, 1e-2, True)


def heavy_ball() -> reference.SGD:
    return reference.SGD(0.9, 1e-2)


def compare(
    algorithm: Any,
    expected: plain.FlatRun,
    make: Callable[[], reference.SGD],
    tolerance: float = 1e-5,
    rates: Callable[[int], float] = schedule,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Train as the reference has been trained and compare x and z after every step; returns the optimizer."""
    config, steps = make(), len(expected.trail)
    model = network(dtype)
    plain_sgd = torch.optim.SGD(
        model.parameters(),
        lr=0.02,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    optimizer = wrap(model, plain_sgd, algorithm)
    points: list[torch.Tensor] = []
    history: list[torch.Tensor] = []

    def remember(t: int) -> None:
        points.append(flat(model))
        with optimizer.consensus():
            history.append(flat(model))

    train(model, optimizer, steps, rates, after_step=remember)
    same_everywhere(torch.cat(history), f"x at some step with {algorithm}")
    for t, (x, z) in enumerate(expected.trail):
        close(points[t], _ordered(z[hvd.rank()]), tolerance, f"z after step {t} with {algorithm}, {dtype}")
        close(history[t], _ordered(x), tolerance, f"x after step {t} with {algorithm}, {dtype}")
    # With EF momentum comes after the exchange: what is held back is not yet an update.
    if algorithm.exchanges_updates or isinstance(algorithm, LIEC):
        lr = 1.0 if algorithm.exchanges_updates else rates(steps - 1)
        held = reference.mean(expected.e) + expected.s
        with optimizer.consensus("virtual"):
            close(flat(model), _ordered(expected.x - lr * held), tolerance, f"y with {algorithm}")
    return optimizer


def _ordered(vector: Any) -> Any:
    return joined(plain.from_flat(vector))


def keep_mass(
    algorithm: Any, op: Any = hvd.Average, tolerance: float = 1e-12, steps: int = STEPS if FULL else 20
) -> None:
    """Fail unless y_{t+1} = y_t - eta_t * mean of the local step directions, whatever the rate does, and x is one."""
    # Momentum after the exchange (EF) or kept by models that differ (LIEC) is no part of the identity.
    mu, wd = 0.9 if algorithm.exchanges_updates else 0.0, 1e-2
    model, twin = network(torch.float64), network(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=mu, weight_decay=wd)
    optimizer = wrap(model, sgd, algorithm, op=op)
    factor = 1 if op == hvd.Average else hvd.size()
    # Updates are local: there, what is to become a sum is multiplied before it becomes momentum.
    early = factor if algorithm.exchanges_updates else 1
    with optimizer.consensus("virtual"):
        before = flat(model)
    for t in range(steps):
        lr = (0.02, 0.002, 0.005)[t // 8 % 3] / factor
        optimizer.param_groups[0]["lr"] = lr
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, hvd.rank(), t).backward()
        gradients = [p.grad.mul_(early) for p in twin.parameters()]
        if algorithm.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), early * algorithm.clip_norm / hvd.size() ** 0.5)
        kept = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
        direction = torch.cat(
            [
                (g + wd * early / factor * p.detach() + (0.0 if m is None else mu * m)).reshape(-1)
                for g, p, m in zip(gradients, twin.parameters(), kept)
            ]
        )
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        with optimizer.consensus("virtual"):
            after = flat(model)
        mean = hvd.allreduce(direction, name="test.direction")
        close(after, before - lr * factor / early * mean, tolerance, f"y at step {t} with {algorithm}")
        with optimizer.consensus():
            same_everywhere(flat(model), f"x after step {t} with {algorithm}")
        before = after
