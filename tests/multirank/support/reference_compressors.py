"""A bucket as one flat numpy vector, and compressors as maps of such vectors, for the flat numpy references.

The order in the vector is the package's: last parameters first. A compressor maps a float64 vector and a step to what
is decoded from its payload.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional, Sequence

import numpy as np
import torch

from hvd_compress import CountSketch
from hvd_compress.compressors import Layout, counter_rng
from hvd_compress.compressors.counter_rng import tensor_key
from tests.multirank.support import reference
from tests.multirank.support.reference import Array, Tensors

ORDER = tuple(reversed(reference.SHAPES))
SIZES = {name: int(np.prod(reference.SHAPES[name])) for name in ORDER}
TOTAL = sum(SIZES.values())
WHOLE = (0, TOTAL)
Map = Callable[[Array, int], Array]
# Maps the vectors of all ranks and a step to what is decoded from each one's payload; all ranks apply the mean.
Joint = Callable[[Sequence[Array], int], list[Array]]


def to_flat(tensors: Tensors) -> Array:
    """Return the tensors as one vector."""
    return np.concatenate([tensors[name].reshape(-1) for name in ORDER])


def from_flat(flat: Array) -> Tensors:
    """Return the tensors that a vector is made of."""
    parts = np.split(flat, np.cumsum([SIZES[name] for name in ORDER])[:-1])
    return {name: part.reshape(reference.SHAPES[name]).copy() for name, part in zip(ORDER, parts)}


def borders(ranks: int, total: int = TOTAL) -> list[int]:
    """Return where shards begin and end: at multiples of 8 elements, of almost equal length."""
    units = -(-total // 8)
    return [min(total, 8 * (units * k // ranks)) for k in range(ranks + 1)]


def parts(cuts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (name, begin, end) of the tensors' parts between the cuts, in order; a cut tensor gives several."""
    found = []
    for low, high in zip(cuts, cuts[1:]):
        begin = 0
        for name, size in SIZES.items():
            a, b = max(low, begin), min(high, begin + size)
            if a < b:
                found.append((name if b - a == size else f"{name}@{a - begin}", a, b))
            begin += size
    return found


# -- compressors ---------------------------------------------------------------------------------------


def identity(v: Array, step: int) -> Array:
    """Send everything."""
    return v.copy()


def signs(spans: Sequence[tuple[int, int]]) -> Map:
    """Return the map to each block's mean magnitude, in float32, times the signs."""

    def compress(v: Array, step: int) -> Array:
        out = np.zeros_like(v)
        for a, b in spans:
            out[a:b] = np.float32(np.abs(v[a:b]).mean()) * np.where(v[a:b] >= 0, 1.0, -1.0)
        return out

    return compress


def sign_blocks(block_size: Optional[int], cuts: Sequence[int] = WHOLE) -> list[tuple[int, int]]:
    """Return (begin, end) of the blocks of each part between cuts; without a size a part is one block."""
    return [(i, min(b, i + (block_size or b - a))) for _, a, b in parts(cuts) for i in range(a, b, block_size or b - a)]


def top(density: float, cuts: Sequence[int] = WHOLE) -> Map:
    """Return the map to the largest magnitudes of each stretch between cuts."""

    def compress(v: Array, step: int) -> Array:
        out = np.zeros_like(v)
        for a, b in zip(cuts, cuts[1:]):
            if b > a:
                k = max(1, int((b - a) * density))
                chosen = a + np.argsort(-np.abs(v[a:b]), kind="stable")[:k]
                out[chosen] = v[chosen]
        return out

    return compress


def selected(select: Callable[[str, int, int], Any], cuts: Sequence[int] = WHOLE, prefix: str = "") -> Map:
    """Return the map of RandomBlock or RandomK; ``select`` gives (start, length) or indices of each tensor or part."""

    def compress(v: Array, step: int) -> Array:
        out = np.zeros_like(v)
        for name, a, b in parts(cuts):
            choice = select(prefix + name, b - a, step)
            if isinstance(choice, tuple):
                choice = (choice[0] + np.arange(choice[1])) % (b - a)
            out[a + choice] = v[a + choice]
        return out

    return compress


def alone(compress: Map) -> Joint:
    """Let each rank compress its own vector."""
    return lambda vectors, step: [compress(v, step) for v in vectors]


def float32(v: Array, step: int) -> Array:
    """Round to float32."""
    return v.astype(np.float32).astype(np.float64)


def staged(maps: Sequence[Map], steps: int) -> Map:
    """Apply each map for so many steps, the last one for the rest."""
    return lambda v, step: maps[min(step // steps, len(maps) - 1)](v, step)


def mixed(default: Map, others: Mapping[str, Map]) -> Map:
    """Apply other maps to some tensors; every map treats tensors one by one."""

    def compress(v: Array, step: int) -> Array:
        out = default(v, step).copy()
        for name, a, b in parts(WHOLE):
            if name in others:
                out[a:b] = others[name](v, step)[a:b]
        return out

    return compress


def span(name: str) -> tuple[int, int]:
    """Return where a tensor begins and ends."""
    return next((a, b) for found, a, b in parts(WHOLE) if found == name)


def power_sgd(rank: int) -> Joint:
    """Return PowerSGD of the ranks' mean, each step starting with the last Q; vectors are sent uncompressed.

    Each rank has contributed P Q_k^T of its own matrix M_k, with Q_k = M_k^T P; their mean is P Q^T.
    """
    last = {
        name: counter_rng.nearly_normal(tensor_key(0, name), (shape[1], rank), torch.device("cpu")).double().numpy()
        for name, shape in reference.SHAPES.items()
        if len(shape) > 1
    }

    def compress(vectors: Sequence[Array], step: int) -> list[Array]:
        mean, own = from_flat(reference.mean(vectors)), [from_flat(v.copy()) for v in vectors]
        for name, q in last.items():
            p = np.linalg.qr(mean[name] @ q)[0]
            last[name] = mean[name].T @ p
            for matrices in own:
                matrices[name] = p @ (p.T @ matrices[name])
        return [to_flat(matrices) for matrices in own]

    return compress


def matrix_of(sketch: CountSketch, names: tuple[str, ...] = ORDER) -> Callable[[int], tuple[Array, int]]:
    """Return a function of the step: the sketch of these tensors as a matrix, and its number of rows.

    Columns are sketches of unit vectors; those of other tensors are zero.
    """
    layout = Layout(names, tuple(SIZES[name] for name in names))
    codec = sketch.codec(layout, torch.float64, torch.device("cpu"))
    sketched = np.concatenate([np.full(size, name in names) for name, size in SIZES.items()])

    def at(step: int) -> tuple[Array, int]:
        codec.set_step(step)
        matrix = np.zeros((codec.numel, TOTAL))
        for place, unit in zip(np.flatnonzero(sketched), torch.eye(layout.total, dtype=torch.float64, device="cpu")):
            payload = torch.zeros(codec.numel, dtype=codec.dtype, device="cpu")
            codec.encode(unit, payload)
            matrix[:, place] = payload.numpy()
        return matrix, sketch.rows

    return at
