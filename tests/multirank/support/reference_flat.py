"""Plain numpy versions, all ranks in one loop, of the algorithms that see a bucket as one flat vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence, Union

import numpy as np

from tests.multirank.support import reference
from tests.multirank.support.reference import SGD, Array, Tensors
from tests.multirank.support.reference_compressors import TOTAL, Joint, Map, from_flat, to_flat, top


@dataclass
class FlatRun:
    """State after a run, as flat vectors.

    Attributes:
        x: the shared model.
        e: each rank's residual as a worker.
        z: each rank's point.
        s: the server's residual.
        trail: x and all z after each step.
    """

    x: Array
    e: list[Array]
    z: list[Array]
    s: Array
    trail: list[tuple[Array, list[Array]]]


def _gradients(points: Sequence[Array], t: int) -> list[Tensors]:
    """Return each rank's gradient at its own point."""
    return [reference.gradient(from_flat(z), *reference.batch(k, t)) for k, z in enumerate(points)]


def _updates(
    points: Sequence[Array], t: int, lr: float, optimizers: Sequence[SGD], clip: Optional[float] = None
) -> list[Array]:
    """Return what each rank's optimizer subtracts at its own point, the local gradient clipped before."""
    found = _gradients(points, t)
    if clip is not None:
        norms = [float(np.linalg.norm(to_flat(g))) for g in found]
        shares = [min(1.0, clip / len(points) ** 0.5 / (norm + 1e-6)) for norm in norms]  # as torch does
        found = [{name: share * v for name, v in g.items()} for share, g in zip(shares, found)]
    return [to_flat(o.update(from_flat(z), g, lr)) for o, z, g in zip(optimizers, points, found)]


def _ratio(schedule: Callable[[int], float], t: int, rescale: bool) -> float:
    """Return eta_{t-1} / eta_t, the factor that keeps a residual of gradients constant as an update."""
    before, now = schedule(max(t - 1, 0)), schedule(t)
    return before / now if rescale and before > 0 and now > 0 else 1.0


def _update_ratio(schedule: Callable[[int], float], t: int, rescale: bool) -> float:
    """Return eta_t / eta_{t-1}, by which a residual of updates changes unless it keeps its units."""
    return 1.0 if rescale else 1 / _ratio(schedule, t, True)


def _mask(optimizer: SGD, chosen: Any) -> None:
    """Clear the momentum where something was sent."""
    momentum = to_flat(optimizer.buffer)
    momentum[chosen] = 0
    optimizer.buffer = from_flat(momentum)


def detached(
    ranks: int,
    steps: int,
    coefficient: Optional[float],
    compress: Joint,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
    masking: bool = False,
    clip: Optional[float] = None,
) -> FlatRun:
    """Train with DEF; without a coefficient it is measured on what is exchanged, beginning with 0.3."""
    measured, now = np.zeros(2), 0.3 if coefficient is None else coefficient
    x = to_flat(reference.initial())
    e, z = [np.zeros(TOTAL) for _ in range(ranks)], [x.copy() for _ in range(ranks)]
    optimizers, trail = [make() for _ in range(ranks)], []
    for t in range(steps):
        r = _update_ratio(schedule, t, rescale)
        p = [r * e[k] + u for k, u in enumerate(_updates(z, t, schedule(t), optimizers, clip))]
        c = compress(p, t)
        x = x - reference.mean(c)
        e = [p[k] - c[k] for k in range(ranks)]
        z = [x - now * e[k] for k in range(ranks)]
        trail.append((x, z))
        for k in range(ranks if masking else 0):
            _mask(optimizers[k], c[k] != 0)
        if coefficient is None:
            norms = np.array([np.sum(reference.mean(c) ** 2), np.mean([np.sum(v**2) for v in c])])
            measured = 0.9 * measured + 0.1 * norms
            now = min(1.0, measured[0] / measured[1])
    return FlatRun(x, e, z, np.zeros(TOTAL), trail)


def error_feedback(
    ranks: int,
    steps: int,
    compress: Joint,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
) -> FlatRun:
    """Train with error feedback on gradients."""
    x, optimizer, trail = to_flat(reference.initial()), make(), []
    e = [np.zeros(TOTAL) for _ in range(ranks)]
    for t in range(steps):
        r = _ratio(schedule, t, rescale)
        p = [to_flat(g) + r * e[k] for k, g in enumerate(_gradients([x] * ranks, t))]
        c = compress(p, t)
        e = [p[k] - c[k] for k in range(ranks)]
        x = x - to_flat(optimizer.update(from_flat(x), from_flat(reference.mean(c)), schedule(t)))
        trail.append((x, [x] * ranks))
    return FlatRun(x, e, [x] * ranks, np.zeros(TOTAL), trail)


def dist_ef(
    ranks: int,
    steps: int,
    up: Map,
    down: Map,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
    coefficients: Union[float, Array] = 0.0,
) -> FlatRun:
    """Train with dist-EF-blockSGDM in update units: errors of workers and server, weight decay inside the update.

    Coordinates with a coefficient are DEF's if ``down`` is the identity on them.
    """
    x, s = to_flat(reference.initial()), np.zeros(TOTAL)
    e, z = [np.zeros(TOTAL) for _ in range(ranks)], [x] * ranks
    optimizers, trail = [make() for _ in range(ranks)], []
    for t in range(steps):
        r = _update_ratio(schedule, t, rescale)
        p = [r * e[k] + u for k, u in enumerate(_updates(z, t, schedule(t), optimizers))]
        sent = [up(p[k], t) for k in range(ranks)]
        e = [p[k] - sent[k] for k in range(ranks)]
        total = reference.mean(sent) + r * s
        answer = down(total, t)
        s = total - answer
        x = x - answer
        z = [x - coefficients * e[k] for k in range(ranks)]
        trail.append((x, z))
    return FlatRun(x, e, z, s, trail)


def liec(
    ranks: int,
    steps: int,
    period: int,
    up: Map,
    down: Map,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
) -> FlatRun:
    """Train with LIEC-SGD: the local error is applied at once, only the server's persists."""
    z, s = [to_flat(reference.initial()) for _ in range(ranks)], np.zeros(TOTAL)
    optimizers, trail = [make() for _ in range(ranks)], []
    for t in range(steps):
        s = s * _ratio(schedule, t, rescale)
        g = [to_flat(gradient) for gradient in _gradients(z, t)]
        if (t + 1) % period == 0:
            z = [reference.mean(z)] * ranks
            d = [reference.mean(g) + s] * ranks
            s = np.zeros(TOTAL)
        else:
            sent = [up(g[k], t) for k in range(ranks)]
            p = reference.mean(sent) + s
            q = down(p, t)
            s = p - q
            d = [q + g[k] - sent[k] for k in range(ranks)]
        moved = [o.update(from_flat(z[k]), from_flat(d[k]), schedule(t)) for k, o in enumerate(optimizers)]
        z = [z[k] - to_flat(moved[k]) for k in range(ranks)]
        trail.append((reference.mean(z), z))
    return FlatRun(reference.mean(z), [np.zeros(TOTAL)] * ranks, z, s, trail)


def global_sketch(
    ranks: int,
    steps: int,
    k: int,
    candidates: int,
    sketch: Callable[[int], tuple[Array, int]],
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    masking: bool,
    rescale: bool = True,
) -> FlatRun:
    """Train with gs-SGD; ``sketch(step)`` gives the matrix that maps a vector to its table, and the table's rows.

    Coordinates that are in no row are averaged at once.
    """
    x, trail = to_flat(reference.initial()), []
    v, optimizers = [np.zeros(TOTAL) for _ in range(ranks)], [make() for _ in range(ranks)]
    for t in range(steps):
        ratio = _update_ratio(schedule, t, rescale)
        v = [ratio * v[r] + u for r, u in enumerate(_updates([x] * ranks, t, schedule(t), optimizers))]
        matrix, rows = sketch(t)
        dense = ~matrix.any(axis=0)
        x = x - np.where(dense, reference.mean(v), 0.0)
        v = [np.where(dense, 0.0, v[r]) for r in range(ranks)]
        table = matrix @ reference.mean(v)
        # In each row a coordinate has one entry, its sign, where it is counted.
        per_row = matrix.reshape(rows, -1, TOTAL)
        estimate = np.median(np.einsum("rcn,rc->rn", per_row, table.reshape(rows, -1)), axis=0)
        found = np.sort(np.argsort(-np.abs(estimate), kind="stable")[: min(TOTAL, candidates * k)])
        values = reference.mean(v)[found]
        kept = np.argsort(-np.abs(values), kind="stable")[:k]
        chosen = found[kept]
        x = x.copy()
        x[chosen] -= values[kept]
        for r in range(ranks):
            v[r] = v[r].copy()
            v[r][chosen] = 0
            if masking:
                _mask(optimizers[r], chosen)
        trail.append((x, [x] * ranks))
    return FlatRun(x, v, [x] * ranks, np.zeros(TOTAL), trail)


def global_topk(
    ranks: int,
    steps: int,
    density: float,
    schedule: Callable[[int], float],
    make: Callable[[], SGD],
    rescale: bool = True,
) -> FlatRun:
    """Train with gTop-k; what a merge drops stays with the rank that merged."""
    x, keep, trail = to_flat(reference.initial()), top(density), []
    e, optimizers = [np.zeros(TOTAL) for _ in range(ranks)], [make() for _ in range(ranks)]
    for t in range(steps):
        ratio = _update_ratio(schedule, t, rescale)
        p = [ratio * e[r] + u for r, u in enumerate(_updates([x] * ranks, t, schedule(t), optimizers))]
        offers = [keep(p[r], t) for r in range(ranks)]
        e = [p[r] - offers[r] for r in range(ranks)]
        distance = 1
        while distance < ranks:
            for r in range(0, ranks, 2 * distance):
                if r + distance < ranks:
                    total = offers[r] + offers[r + distance]
                    offers[r] = keep(total, t)
                    e[r] = e[r] + total - offers[r]
            distance *= 2
        x = x - offers[0] / ranks
        trail.append((x, [x] * ranks))
    return FlatRun(x, e, [x] * ranks, np.zeros(TOTAL), trail)
