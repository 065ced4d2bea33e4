"""More compressors for the flat numpy references: those of several ranks, of stages, and one for each tensor."""

from __future__ import annotations

from typing import Callable, Mapping, Sequence

import numpy as np
import reference
import reference_flat as plain
import torch
from reference import Array
from reference_flat import Map

from hvd_compress import CountSketch
from hvd_compress.compressors import Layout, counter_rng
from hvd_compress.compressors.counter_rng import tensor_key


def float32(v: Array, step: int) -> Array:
    return v.astype(np.float32).astype(np.float64)


def staged(maps: Sequence[Map], steps: int) -> Map:
    """Each map for so many steps, the last one for the rest."""
    return lambda v, step: maps[min(step // steps, len(maps) - 1)](v, step)


def mixed(default: Map, others: Mapping[str, Map]) -> Map:
    """Some tensors by maps of their own; every map treats tensors one by one."""

    def compress(v: Array, step: int) -> Array:
        out = default(v, step).copy()
        for name, a, b in plain.parts(plain.WHOLE):
            if name in others:
                out[a:b] = others[name](v, step)[a:b]
        return out

    return compress


def span(name: str) -> tuple[int, int]:
    """Where a tensor begins and ends."""
    return next((a, b) for found, a, b in plain.parts(plain.WHOLE) if found == name)


def power_sgd(rank: int) -> plain.Joint:
    """PowerSGD of the ranks' mean, each step starting with the last Q; vectors travel whole."""
    last = {
        name: counter_rng.nearly_normal(tensor_key(0, name), (shape[1], rank), torch.device("cpu")).double().numpy()
        for name, shape in reference.SHAPES.items()
        if len(shape) > 1
    }

    def compress(vectors: Sequence[Array], step: int) -> list[Array]:
        mean = plain.from_flat(reference.mean(vectors))
        for name, q in last.items():
            p = np.linalg.qr(mean[name] @ q)[0]
            last[name] = mean[name].T @ p
            mean[name] = p @ last[name].T
        return [plain.to_flat(mean)] * len(vectors)

    return compress


def matrix_of(sketch: CountSketch, names: tuple[str, ...] = plain.ORDER) -> Callable[[int], tuple[Array, int]]:
    """The sketch of these tensors as a matrix, column by column from unit vectors; zero columns for others."""
    layout = Layout(names, tuple(plain.SIZES[name] for name in names))
    codec = sketch.codec(layout, torch.float64, torch.device("cpu"))
    sketched = np.concatenate([np.full(size, name in names) for name, size in plain.SIZES.items()])

    def at(step: int) -> tuple[Array, int]:
        codec.set_step(step)
        matrix = np.zeros((codec.numel, plain.TOTAL))
        for place, unit in zip(np.flatnonzero(sketched), torch.eye(layout.total, dtype=torch.float64)):
            payload = torch.zeros(codec.numel, dtype=codec.dtype)
            codec.encode(unit, payload)
            matrix[:, place] = payload.numpy()
        return matrix, sketch.rows

    return at
