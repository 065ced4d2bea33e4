"""Shared by the tests of signs: the loops they run with, vectors, and the definition in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Codec, Layout
from hvd_compress.native import signs

LOADED = signs._signs  # before any test patches it
CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDE = [torch.float32, torch.float64]
# The fixture makes the same setting for every example, so it need not run again.
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

sizes = st.one_of(st.none(), st.integers(1, 40))
numbers = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 90)), max_size=8)


@pytest.fixture(autouse=True, params=["torch", "native"] if LOADED else ["torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with torch's operations, and with the compiled loops if they are built."""
    monkeypatch.setattr(signs, "_signs", LOADED if request.param == "native" else None)
    return str(request.param)


def vector(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal values, some zeros of both signs, and a quarter of zeros in a row."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal(n) * (rng.random(n) < 0.9) * rng.choice([-1.0, 1.0], n)
    v[n // 2 : n // 2 + n // 4] = 0.0
    return torch.from_numpy(v).to(dtype)


def named(numels: Sequence[int]) -> Layout:
    return Layout(tuple(f"p{i}" for i in range(len(numels))), tuple(numels))


def blocks(numels: Sequence[int], size: Optional[int]) -> list[slice]:
    """Return all blocks of tensors that lie one after the other."""
    found, begin = [], 0
    for n in numels:
        step = size or max(n, 1)
        found += [slice(begin + i, begin + min(i + step, n)) for i in range(0, n, step)]
        begin += n
    return found


def reference(v: np.ndarray, places: Sequence[slice]) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and signs by the definition, in float64."""
    v = v.astype(np.float64)
    return np.array([np.abs(v[b]).sum() / (b.stop - b.start) for b in places]), np.where(v >= 0, 1.0, -1.0)


def unpack(payload: Tensor, n: int, count: int, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and signs of a payload whose scales begin at byte ``at``."""
    raw = payload.numpy().tobytes()
    bits = np.unpackbits(np.frombuffer(raw[: (n + 7) // 8], dtype=np.uint8), bitorder="little")
    assert not bits[n:].any(), "unused bits"
    return np.frombuffer(raw[at : at + 4 * count], dtype=np.float32), np.where(bits[:n], 1.0, -1.0)


def spread(scales: np.ndarray, places: Sequence[slice], n: int) -> np.ndarray:
    out = np.zeros(n, dtype=scales.dtype)
    for scale, place in zip(scales, places):
        out[place] = scale
    return out


def encoded(codec: Codec, flat: Tensor) -> Tensor:
    codec.set_step(0)
    payload = torch.full((codec.numel,), 255, dtype=codec.dtype)
    codec.encode(flat, payload)
    return payload
