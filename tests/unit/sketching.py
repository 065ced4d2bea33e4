"""Fixture and helpers for tests of the count-sketch: each way to compute it, and a second, plain implementation."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hvd_compress.compressors import CountSketch, Layout, sketch_hash
from hvd_compress.compressors.count_sketch import CountSketchCodec
from hvd_compress.compressors.counter_rng import draw, tensor_key
from hvd_compress.native import sketch as loops

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
BUILT = importlib.util.find_spec("hvd_compress.native._sketch") is not None
COMPILED = loops._sketch  # before any test patches it
Array = npt.NDArray[np.float64]


@pytest.fixture(autouse=True, params=["slices", "gather", "native"] if BUILT else ["slices", "gather"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test in each way to compute the sketch, with tiles so small that tests need several."""
    monkeypatch.setattr(loops, "_sketch", COMPILED if request.param == "native" else None)
    monkeypatch.setattr(sketch_hash, "_MAX_SLICES", 2**40 if request.param == "slices" else -1)
    monkeypatch.setattr(sketch_hash, "_CPU_TILE", 23)
    return str(request.param)


# Draws and results do not depend on the way, so tests that need many draws run in one way only.
one_way = pytest.mark.parametrize("way", ["native" if BUILT else "slices"], indirect=True)


def values(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coder(n: int, step: int = 0, dtype: torch.dtype = torch.float32, **arguments: Any) -> CountSketchCodec:
    codec = CountSketch(**arguments).codec(Layout(("w",), (n,)), dtype, CPU)
    codec.set_step(step)
    return codec


def table_of(codec: CountSketchCodec, flat: Tensor) -> Tensor:
    payload = torch.full((codec.numel,), math.nan, dtype=codec.dtype)
    codec.encode(flat, payload)
    return payload


def estimates(codec: CountSketchCodec, payload: Tensor, n: int) -> Tensor:
    out = torch.full((n,), math.nan, dtype=codec.dtype)
    codec.estimate(payload, out)
    return out


def places(seed: int, name: str, step: int, n: int, rows: int, columns: int) -> tuple[Any, Array]:
    """Return column and sign of every coordinate in every row, one by one from the definition."""
    column, sign = np.zeros((rows, n), dtype=np.int64), np.zeros((rows, n))
    for j in range(rows):
        key = np.array([tensor_key(seed, f"{name}\0row {j}")], dtype=np.uint64)
        for b in range(-(-n // columns)):
            bits = int(draw(draw(key, b), step)[0])
            for q in range(min(columns, n - b * columns)):
                column[j, b * columns + q] = (q + (bits >> 1) % columns) % columns
                sign[j, b * columns + q] = 1 - 2 * (bits & 1)
    return column, sign
