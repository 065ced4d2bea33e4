"""Plain one-process numpy versions of the algorithms, all ranks in one loop, written from the formulas.

The model is a two-layer tanh network with a squared loss, differentiated by hand, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tensors = dict[str, Array]
Selection = Callable[[str, int, int], tuple[int, int]]

SHAPES: dict[str, tuple[int, ...]] = {"0.weight": (7, 5), "0.bias": (7,), "2.weight": (3, 7), "2.bias": (3,)}
BATCH = 8


def initial(seed: int = 0) -> Tensors:
    """Return initial parameters, by torch's names for Sequential(Linear(5, 7), Tanh(), Linear(7, 3))."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(scale=0.5, size=shape) for name, shape in SHAPES.items()}


def batch(rank: int, step: int) -> tuple[Array, Array]:
    """Return inputs and targets of one rank at one step; every rank has a distribution of its own."""
    rng = np.random.default_rng([17, rank, step])
    inputs = rng.normal(size=(BATCH, 5)) + 0.3 * rank
    return inputs, np.sin(inputs[:, :3]) + 0.1 * rank


def gradient(w: Tensors, inputs: Array, targets: Array) -> Tensors:
    """Return the gradient of the mean over batch and outputs of (f(x) - y)^2."""
    hidden = np.tanh(inputs @ w["0.weight"].T + w["0.bias"])
    error = hidden @ w["2.weight"].T + w["2.bias"] - targets
    out = 2 * error / error.size
    back = (out @ w["2.weight"]) * (1 - hidden**2)
    return {"0.weight": back.T @ inputs, "0.bias": back.sum(0), "2.weight": out.T @ hidden, "2.bias": out.sum(0)}


@dataclass
class SGD:
    """The arithmetic of torch.optim.SGD."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    buffer: Tensors = field(default_factory=dict)

    def update(self, w: Tensors, g: Tensors, lr: float) -> Tensors:
        """Return what a step subtracts from ``w``, whose gradient is ``g``."""
        result = {}
        for name in w:
            d = g[name] + self.weight_decay * w[name]
            m = self.momentum * self.buffer.get(name, 0.0) + d
            self.buffer[name] = m
            result[name] = lr * (d + self.momentum * m if self.nesterov else m)
        return result


def block(v: Array, name: str, step: int, select: Selection) -> Array:
    """Return C(v): the chosen block of v, zero elsewhere."""
    start, length = select(name, v.size, step)
    chosen = (start + np.arange(length)) % max(v.size, 1)
    out = np.zeros(v.size)
    out[chosen] = v.reshape(-1)[chosen]
    return out.reshape(v.shape)


def mean(values: Sequence[Array]) -> Array:
    """Return the mean of several arrays."""
    return np.mean(np.stack(values), axis=0)


def joined(tensors: Tensors) -> Array:
    """Return tensors as one vector, in the order of the model's parameters."""
    return np.concatenate([tensors[name].reshape(-1) for name in SHAPES])


@dataclass
class Run:
    """State after a run: the shared model, each rank's residual and point."""

    x: Tensors
    e: list[Tensors]
    z: list[Tensors]


def detached(
    ranks: int,
    steps: int,
    coefficient: float,
    select: Selection,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    local_steps: int = 1,
) -> Run:
    """Train with DEF, with any momentum, one optimizer per rank."""
    x = initial()
    zero = {n: np.zeros(s) for n, s in SHAPES.items()}
    e, z = [dict(zero) for _ in range(ranks)], [dict(x) for _ in range(ranks)]
    optimizers = [make() for _ in range(ranks)]
    for t in range(steps):
        p = []
        for k in range(ranks):
            pending = dict(e[k])
            for h in range(local_steps):
                g = gradient(z[k], *batch(k, t * local_steps + h))
                u = optimizers[k].update(z[k], g, schedule(t))
                z[k] = {n: z[k][n] - u[n] for n in x}
                pending = {n: pending[n] + u[n] for n in x}
            p.append(pending)
        c = [{n: block(p[k][n], n, t, select) for n in x} for k in range(ranks)]
        x = {n: x[n] - mean([c[k][n] for k in range(ranks)]) for n in x}
        e = [{n: p[k][n] - c[k][n] for n in x} for k in range(ranks)]
        z = [{n: x[n] - coefficient * e[k][n] for n in x} for k in range(ranks)]
    return Run(x, e, z)


def error_feedback(
    ranks: int,
    steps: int,
    select: Selection,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
) -> Run:
    """Train with error feedback on gradients.

    One optimizer steps, after aggregation; residuals are rescaled by eta_{t-1} / eta_t.
    """
    x = initial()
    e = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(ranks)]
    optimizer = make()
    for t in range(steps):
        before, now = schedule(max(t - 1, 0)), schedule(t)
        r = before / now if rescale and before > 0 and now > 0 else 1.0
        p = []
        for k in range(ranks):
            g = gradient(x, *batch(k, t))
            p.append({n: g[n] + r * e[k][n] for n in x})
        c = [{n: block(p[k][n], n, t, select) for n in x} for k in range(ranks)]
        e = [{n: p[k][n] - c[k][n] for n in x} for k in range(ranks)]
        u = optimizer.update(x, {n: mean([c[k][n] for k in range(ranks)]) for n in x}, now)
        x = {n: x[n] - u[n] for n in x}
    return Run(x, e, [x] * ranks)


def data_parallel(ranks: int, steps: int, schedule: Callable[[int], float], make: Callable[[], SGD]) -> Run:
    """Train with plain data-parallel SGD."""
    return error_feedback(ranks, steps, lambda name, n, t: (0, n), schedule, make)


def local_sgd_with_block_averaging(
    ranks: int, steps: int, select: Selection, schedule: Callable[[int], float], make: Callable[[], SGD]
) -> list[Tensors]:
    """Let each rank train its own model, of which one random block per step is averaged; return the models."""
    models = [initial() for _ in range(ranks)]
    optimizers = [make() for _ in range(ranks)]
    for t in range(steps):
        for k in range(ranks):
            u = optimizers[k].update(models[k], gradient(models[k], *batch(k, t)), schedule(t))
            models[k] = {n: models[k][n] - u[n] for n in u}
        for n in SHAPES:
            start, length = select(n, models[0][n].size, t)
            chosen = (start + np.arange(length)) % models[0][n].size
            average = mean([models[k][n].reshape(-1)[chosen] for k in range(ranks)])
            for k in range(ranks):
                flat = models[k][n].reshape(-1).copy()
                flat[chosen] = average
                models[k][n] = flat.reshape(models[k][n].shape)
    return models
