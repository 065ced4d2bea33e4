"""The count-sketch: the statistics of its estimates, and the heavy hitters that it finds."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import CountSketch, Layout, sketch_hash
from tests.unit.sketching import CPU, DTYPES, Array, coder, estimates, one_way, table_of, values, way

__all__ = ["way"]  # the fixture


# -- statistics ----------------------------------------------------------------------------------------


@one_way
@pytest.mark.parametrize("rows", [1, 3])
def test_estimates_are_unbiased_with_the_variance_of_a_full_hash(way: str, rows: int) -> None:
    """A row's variance is the energy of the other blocks over c, which is at most ||v||^2 / c."""
    n, c, steps = 45, 7, 2000
    v = values(n)
    codec, drawn = coder(n, columns=c, rows=rows), np.zeros((steps, n))
    for step in range(steps):
        codec.set_step(step)
        drawn[step] = estimates(codec, table_of(codec, v), n).numpy()
    error = drawn - v.numpy()
    blocks = np.array([float((b**2).sum()) for b in np.split(v.double().numpy(), range(c, n, c))])
    variance = np.repeat((blocks.sum() - blocks) / c, c)[:n]
    assert np.all(np.abs(error.mean(axis=0)) < 5 * np.sqrt(variance / steps))
    if rows == 1:
        np.testing.assert_allclose((error**2).mean(axis=0), variance, rtol=0.25)
        assert error.var() < float((v**2).sum()) / c
    else:
        assert np.all((error**2).mean(axis=0) < variance), "several rows are better than one"


def random_hash_recall(v: Array, rows: int, columns: int, k: int, seed: int) -> float:
    """Return the recall of the k largest of a textbook sketch, which hashes every coordinate independently."""
    rng = np.random.default_rng(seed)
    column, sign = rng.integers(0, columns, (rows, v.size)), rng.choice([-1.0, 1.0], (rows, v.size))
    rows_of = [np.bincount(h, weights=s * v, minlength=columns) for h, s in zip(column, sign)]
    found = np.median([s * row[h] for row, h, s in zip(rows_of, column, sign)], axis=0)
    return recall(v, np.argsort(-np.abs(found))[:k], k)


def recall(v: Array, found: Any, k: int) -> float:
    return len(set(np.argsort(-np.abs(v))[:k].tolist()) & set(found.tolist())) / k


@one_way
@pytest.mark.parametrize("ratio", [2, 10])
def test_recall_is_that_of_a_full_random_hash(way: str, ratio: int) -> None:
    n, k, trials = 20_000, 200, 6
    # The values have heavy tails, and the large ones are neighbours, as in a layer with large gradients.
    v = np.random.default_rng(0).standard_t(2, n) * np.where(np.arange(n) < n // 4, 3.0, 1.0)
    codec = coder(n, columns=ratio * k, rows=5)
    ours, theirs = [], []
    for trial in range(trials):
        codec.set_step(trial)
        payload = table_of(codec, torch.from_numpy(v).float())
        ours.append(recall(v, codec.heavy_hitters(payload, k).numpy(), k))
        theirs.append(random_hash_recall(v, 5, ratio * k, k, trial))
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.05
    assert np.mean(ours) > (0.15 if ratio == 2 else 0.7)


# -- heavy hitters -------------------------------------------------------------------------------------


def largest(sizes: Tensor, count: int) -> list[int]:
    """Return the ascending indices of the largest; of equal ones the lowest indices are taken."""
    return sorted(torch.sort(sizes.abs(), descending=True, stable=True).indices[:count].tolist())


@settings(max_examples=25)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 300), st.sampled_from(DTYPES), st.booleans())
def test_heavy_hitters_are_the_largest_estimates(
    n: int, columns: int, count: int, dtype: torch.dtype, ties: bool
) -> None:
    v = values(n, dtype=dtype)
    codec, count = coder(n, dtype=dtype, columns=columns), min(n, count)
    payload = table_of(codec, v.round() if ties else v)
    found = codec.heavy_hitters(payload, count)
    assert found.dtype == torch.int64
    assert found.tolist() == largest(estimates(codec, payload, n), count)


N = 300_000
HARD: dict[str, Any] = {
    "normal": lambda: values(N),
    "heavy": lambda: values(N) ** 5,
    "zero": lambda: torch.zeros(N),
    "constant": lambda: -torch.ones(N),
    "ascending": lambda: torch.arange(float(N)),
    "descending": lambda: -torch.arange(float(N), 0.0, -1.0),
    "few_values": lambda: values(N).round(),
    "sample_too_high": lambda: torch.where(torch.arange(N) % (256 * 64) < 256, 100.0, 1.0) * (1 + values(N).abs()),
    "sample_too_low": lambda: torch.where(torch.arange(N) % (256 * 64) < 256, 0.0, 1.0) * values(N),
}


@one_way
@pytest.mark.parametrize("kind", HARD)
def test_heavy_hitters_whatever_the_distribution(way: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Sketches are exact here, so that the estimates are the vector; the counts need scratch memory of other sizes."""
    monkeypatch.setattr(sketch_hash, "_CPU_TILE", 2**16)
    v = HARD[kind]()
    codec = coder(N, density=1, rows=3)
    payload = table_of(codec, v)
    for count in (1, 30_000, 700):
        found = codec.heavy_hitters(payload, count)
        assert torch.equal(found, torch.tensor(largest(v, count))), count


@pytest.mark.parametrize("count", [-1, 41])
def test_a_count_out_of_range(count: int) -> None:
    codec = coder(40)
    with pytest.raises(ValueError, match=rf"count={count} is not allowed.*\[0, 40\]"):
        codec.heavy_hitters(torch.zeros(codec.numel), count)


@pytest.mark.parametrize("layout", [Layout((), ()), Layout(("a",), (0,))])
def test_nothing(layout: Layout) -> None:
    codec, nothing = CountSketch().codec(layout, torch.float32, CPU), torch.empty(0)
    codec.set_step(0)
    codec.encode(nothing, nothing)
    codec.estimate(nothing, nothing)
    codec.accumulate(nothing, nothing, 1.0)
    assert codec.numel == 0
    assert codec.heavy_hitters(nothing, 0).tolist() == []


def test_sharding_gives_tables_of_the_shards() -> None:
    layout: Layout = Layout(("a", "b"), (100, 60))
    sharded = CountSketch(columns=9).sharded(layout, [0, 80, 160], torch.float32, CPU)
    payloads: list[Optional[Tensor]] = [torch.empty(codec.numel) for codec in sharded.codecs]
    sharded.set_step(1)
    sharded.encode(values(160), payloads)  # type: ignore[arg-type]
    assert [codec.numel for codec in sharded.codecs] == [45, 45]
