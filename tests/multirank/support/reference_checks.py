"""Comparisons of algorithms with the flat numpy references at every step, and the mass identity."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import torch

from hvd_compress import LIEC
from tests.multirank.support import reference, reference_flat
from tests.multirank.support.algorithm_cases import exchanges_updates
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import FULL
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference import joined
from tests.multirank.support.reference_compressors import from_flat
from tests.multirank.support.training import train, wrap

STEPS = 100 if FULL else 40
OPS = {"Average": hvd.Average, "Sum": hvd.Sum}


def schedule(t: int) -> float:
    """Return the learning rate of step ``t``: it falls at half of the steps and changes at each one after it."""
    return 0.02 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def nesterov() -> reference.SGD:
    """Return SGD with weight decay and Nesterov momentum."""
    return reference.SGD(0.9, 1e-2, True)


def heavy_ball() -> reference.SGD:
    """Return SGD with weight decay and momentum."""
    return reference.SGD(0.9, 1e-2)


def schedule_from_zero(t: int) -> float:
    """Return ``schedule``, but 0 at the first step."""
    return 0.0 if t == 0 else schedule(t)


def torch_sgd(model: torch.nn.Module, config: reference.SGD, lr: float = 0.02) -> torch.optim.SGD:
    """Return torch's SGD with the settings of the reference's."""
    return torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def compare(
    algorithm: Any,
    expected: reference_flat.FlatRun,
    make: Callable[[], reference.SGD],
    tolerance: float = 1e-5,
    rates: Callable[[int], float] = schedule,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Train as the reference was trained and compare x and z after every step, and y at the end."""
    steps, model = len(expected.trail), network(dtype)
    optimizer = wrap(model, torch_sgd(model, make()), algorithm)
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
    # With EF momentum comes after the exchange: the residual is not yet an update.
    if exchanges_updates(algorithm) or isinstance(algorithm, LIEC):
        lr = 1.0 if exchanges_updates(algorithm) else rates(steps - 1)
        residual = reference.mean(expected.e) + expected.s
        with optimizer.consensus("virtual"):
            close(flat(model), _ordered(expected.x - lr * residual), tolerance, f"y with {algorithm}")


def _ordered(vector: reference.Array) -> reference.Array:
    """Return a flat vector in the order of the model's parameters."""
    return joined(from_flat(vector))


def keep_mass(
    algorithm: Any, op: Any = hvd.Average, tolerance: float = 1e-12, steps: int = STEPS if FULL else 20
) -> None:
    """Fail unless y_{t+1} = y_t - eta_t * mean of the local step directions, and all ranks have the same x."""
    # The identity does not hold for momentum after the exchange (EF) or of models that differ (LIEC).
    mu, wd = 0.9 if exchanges_updates(algorithm) else 0.0, 1e-2
    model, twin = network(torch.float64), network(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=mu, weight_decay=wd)
    optimizer = wrap(model, sgd, algorithm, op=op)
    factor = 1 if op == hvd.Average else hvd.size()
    # Where updates are exchanged, a local gradient is multiplied by ``factor`` before it becomes momentum.
    scale = factor if exchanges_updates(algorithm) else 1
    with optimizer.consensus("virtual"):
        before = flat(model)
    for t in range(steps):
        lr = (0.02, 0.002, 0.005)[t // 8 % 3] / factor
        optimizer.param_groups[0]["lr"] = lr
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, hvd.rank(), t).backward()
        gradients = [p.grad.mul_(scale) for p in twin.parameters()]
        if algorithm.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), scale * algorithm.clip_norm / hvd.size() ** 0.5)
        kept = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
        direction = torch.cat(
            [
                (g + wd * scale / factor * p.detach() + (0.0 if m is None else mu * m)).reshape(-1)
                for g, p, m in zip(gradients, twin.parameters(), kept)
            ]
        )
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        with optimizer.consensus("virtual"):
            after = flat(model)
        mean = hvd.allreduce(direction, name="test.direction")
        close(after, before - lr * factor / scale * mean, tolerance, f"y at step {t} with {algorithm}")
        with optimizer.consensus():
            same_everywhere(flat(model), f"x after step {t} with {algorithm}")
        before = after
