"""Random coordinates: distinct, uniform, the same everywhere; and the payload of a tensor and of a bucket."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Combine, Layout, RandomBlock, RandomK, SummableCodec, random_k
from tests.unit.test_random_block import dependence, surprise

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
STEPS = 1500

densities = st.one_of(st.just(1.0), st.floats(min_value=1e-4, max_value=1.0))
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
layouts = st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 70)), max_size=9).map(
    lambda numels: Layout(tuple(f"p{i}" for i in range(len(numels))), tuple(numels))
)


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return normal values without zeros, so that a decoded zero shows a coordinate that was not sent."""
    v = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return torch.where(v == 0, torch.ones_like(v), v)


def same_bits(a: Tensor, b: Tensor) -> bool:
    width = BITS[a.element_size()]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def count(n: int, density: float) -> int:
    return max(1, math.floor(n * density)) if n else 0


def mask_of(compressor: RandomK, name: str, numel: int, step: int) -> Tensor:
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.from_numpy(compressor.selection(name, numel, step))] = True
    return mask


def many(n: int, k: int) -> np.ndarray:
    """Return a row of k coordinates for each of 10000 pairs of tensor and step."""
    tensors, rows = 1000, []
    places = random_k._Coordinates(RandomK((k + 0.5) / n), Layout(tuple(map(str, range(tensors))), (n,) * tensors))
    for step in range(10):
        rows.append(places.draw(step).reshape(tensors, k) - np.arange(tensors)[:, None] * n)
    return np.concatenate(rows)


def draws(n: int, density: float, name: str = "weight", seed: int = 0, steps: int = STEPS) -> np.ndarray:
    """Return a row of coordinates per step."""
    compressor = RandomK(density, seed)
    return np.array([compressor.selection(name, n, step) for step in range(steps)])


# -- the draw ------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), densities, st.integers(0, 2**70), st.text(max_size=20), st.integers(0, 2**60))
def test_k_distinct_coordinates_in_order(n: int, density: float, seed: int, name: str, step: int) -> None:
    found = RandomK(density, seed).selection(name, n, step)
    assert found.dtype == np.dtype(np.int64) and found.shape == (count(n, density),)
    assert np.all(np.diff(found) > 0)
    assert n == 0 or (found[0] >= 0 and found[-1] < n)


@pytest.mark.parametrize("n", [10**8, 2**40 + 1, 10**15])
def test_large_tensors(n: int) -> None:
    found = RandomK(1e4 / n).selection("w", n, 0)
    assert len(found) in (9999, 10000)
    assert np.all(np.diff(found) > 0)
    assert found[0] >= 0 and found[-1] < n
    assert abs(surprise(np.bincount(found * 100 // n, minlength=100), len(found) / 100)) < 4.5
    assert abs(surprise(np.bincount(found % 64, minlength=64), len(found) / 64)) < 4.5


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 97, 1000, 40_000])
def test_density_one_sends_everything(n: int) -> None:
    for step in range(5):
        assert RandomK(1).selection("w", n, step).tolist() == list(range(n))


def test_the_draw_is_pinned() -> None:
    """The draw is part of the format: ranks may run different releases, and checkpoints outlive them."""
    compressor = RandomK(density=0.005, seed=0)
    assert [compressor.selection("layer.weight", 1000, step).tolist() for step in range(3)] == [
        [147, 149, 224, 372, 717],
        [117, 191, 308, 682, 903],
        [97, 134, 220, 442, 875],
    ]
    assert RandomK(density=3e-8, seed=7).selection("größe.重み", 10**8, 123456).tolist() == [18693569, 92400401]


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (7, 3), (20, 6), (50, 1), (300, 30)])
def test_every_coordinate_is_sent_with_probability_k_over_n(n: int, k: int) -> None:
    rows = many(n, k)
    # Coordinates drawn without replacement vary less than multinomial ones, by (n - k) / (n - 1).
    expected = len(rows) * k / n
    chi_square = float(((np.bincount(rows.ravel(), minlength=n) - expected) ** 2).sum() / expected) * (n - 1) / (n - k)
    assert abs(chi_square - (n - 1)) < 4.5 * math.sqrt(2 * (n - 1))


@pytest.mark.parametrize(("n", "k"), [(10, 2), (30, 2), (100, 2), (64, 3), (300, 3)])
def test_coordinates_of_one_step_are_independent(n: int, k: int) -> None:
    """The differences between two coordinates of a draw are uniform on the circle."""
    rows = many(n, k)
    gaps = np.concatenate([(rows[:, j] - rows[:, i]) % n for i in range(k) for j in range(k) if i != j])
    half = np.bincount(gaps, minlength=n)[1 : (n + 1) // 2]  # the other half mirrors it
    assert abs(surprise(half, half.mean())) < 4.5


def test_steps_names_and_seeds_are_independent() -> None:
    one, other, third = draws(10, 0.1)[:, 0], draws(10, 0.1, name="bias")[:, 0], draws(10, 0.1, seed=1)[:, 0]
    for a, b in ((one[:-1], one[1:]), (one[:-2], one[2:]), (one, other), (one[1:], other[:-1]), (one, third)):
        assert abs(dependence(a, b, 10)) < 4.5


def test_rank_process_and_hash_seed_do_not_matter() -> None:
    """Another process draws the same, as another rank would."""
    calls = [(name, n, step) for name in ("a", "b.weight", "ä") for n in (1, 64, 10**6) for step in (0, 999_999)]
    code = (
        "import json, sys\n"
        "from hvd_compress.compressors import RandomK\n"
        "found = [RandomK(2e-5, 5).selection(*call).tolist() for call in json.load(sys.stdin)]\n"
        "print(json.dumps({'hash': hash('a'), 'found': found}))\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    env = {**os.environ, "PYTHONHASHSEED": seed, "HOROVOD_RANK": "3", "HOROVOD_SIZE": "4"}
    child = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(calls), capture_output=True, text=True, env=env, timeout=300
    )
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    assert answer["hash"] != hash("a"), "the hash seed has had no effect: this test proves nothing"
    assert answer["found"] == [RandomK(2e-5, 5).selection(*call).tolist() for call in calls[::-1]][::-1]


# -- one tensor ----------------------------------------------------------------------------------------


def test_properties() -> None:
    compressor, v = RandomK(0.25), values((40,))
    assert compressor.combine is Combine.SUM
    assert compressor.is_sparsifier
    assert compressor.payload_ratio == 0.25
    assert not torch.equal(compressor.decode(compressor.encode(v)), v), "lossy"


@given(shapes, st.sampled_from(DTYPES), densities, st.integers(0, 9), st.integers(0, 1000))
def test_exactly_the_selected_coordinates_survive(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int, step: int
) -> None:
    compressor, v = RandomK(density, seed), values(shape, dtype)
    payload = compressor.encode(v, "w", step)
    kept, mask = compressor.decode(payload), mask_of(compressor, "w", v.numel(), step).view(shape)
    assert same_bits(kept, torch.where(mask, v, torch.zeros_like(v)))
    assert torch.equal(payload.values, v[mask])
    assert payload.nbytes == count(v.numel(), density) * v.element_size()
    residual = v - kept
    assert same_bits(kept + residual, v), "mass"
    assert same_bits(residual, torch.where(mask, torch.zeros_like(v), v))


def test_the_contraction_is_density_on_average() -> None:
    """E ||v - C(v)||^2 = (1 - k/n) ||v||^2, for any v; here all of its energy is in one coordinate."""
    compressor, v = RandomK(0.25), torch.zeros(40)
    v[11] = 1.0
    lost = [float((v - compressor.decode(compressor.encode(v, "w", step))).square().sum()) for step in range(STEPS)]
    assert abs(np.mean(lost) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / STEPS)


@given(st.sampled_from(DTYPES), densities, st.integers(0, 1000))
def test_any_memory_layout(dtype: torch.dtype, density: float, step: int) -> None:
    compressor, v = RandomK(density), values((4, 6), dtype)
    for view in (v.t(), v[:, ::2], v[1:, 1:], v.expand(3, 4, 6), v[:, 3]):
        one, other = (compressor.decode(compressor.encode(w, "w", step)) for w in (view, view.contiguous()))
        assert same_bits(one, other)


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_payload_is_a_copy(density: float) -> None:
    """A payload must not change when training continues while it is being sent."""
    compressor, v = RandomK(density), values((30,))
    payload = compressor.encode(v, "w", 0)
    before = payload.values.clone()
    v.zero_()
    assert same_bits(payload.values, before)
    kept = compressor.decode(payload)
    payload.values.zero_()
    assert int((kept != 0).sum()) == before.numel()


# -- a bucket ------------------------------------------------------------------------------------------


def at_step(compressor: RandomK, layout: Layout, dtype: torch.dtype, step: int) -> tuple[SummableCodec, Tensor]:
    codec = compressor.codec(layout, dtype, CPU)
    codec.set_step(step)
    return codec, torch.full((codec.numel,), math.nan, dtype=codec.dtype)


@given(layouts, densities, st.integers(0, 3), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
def test_a_bucket_is_its_tensors(layout: Layout, density: float, seed: int, step: int, dtype: torch.dtype) -> None:
    compressor, flat = RandomK(density, seed), values((layout.total,), dtype)
    original, tensors = flat.clone(), torch.split(flat, list(layout.numels)) if layout.names else ()
    codec, payload = at_step(compressor, layout, dtype, step)
    payloads = [compressor.encode(v, name, step) for name, v in zip(layout.names, tensors)]
    expected = torch.cat([flat[:0], *(compressor.decode(payload) for payload in payloads)])

    codec.encode(flat, payload)
    assert same_bits(flat, original), "encode must not touch its input"
    assert codec.dtype == dtype
    assert codec.data_independent
    assert codec.numel == sum(count(n, density) for n in layout.numels)
    assert same_bits(payload, torch.cat([flat[:0], *(payload.values for payload in payloads)]))

    background = values((layout.total,), dtype, seed=5)
    over, added = background.clone(), background.clone()
    codec.write(payload, over)
    assert same_bits(over, torch.where(expected != 0, expected, background))
    parts = [part.clone() for part in torch.split(background, list(layout.numels))] if layout.names else []
    codec.write_tensors(payload, parts)
    assert same_bits(torch.cat([flat[:0], *parts]), over)
    codec.accumulate(payload, added, -1.5)
    torch.testing.assert_close(added, background - 1.5 * expected)
    assert same_bits(added[expected == 0], background[expected == 0])

    # subtracting what was sent leaves exactly zero
    codec.accumulate(payload, flat, -1.0)
    assert same_bits(flat, torch.where(expected != 0, torch.zeros_like(flat), original))


@given(layouts, densities, st.integers(0, 1000))
def test_bucket_payloads_add_and_keep_their_size(layout: Layout, density: float, step: int) -> None:
    a, b = values((layout.total,), seed=1), values((layout.total,), seed=2)
    codec, payload_a = at_step(RandomK(density), layout, torch.float32, step)
    payload_b, both = payload_a.clone(), payload_a.clone()
    for other in (step + 5, step):  # the codec remembers nothing of other steps
        codec.set_step(other)
        for flat, payload in ((a, payload_a), (b, payload_b), (a + b, both)):
            codec.encode(flat, payload)
        assert same_bits(payload_a + payload_b, both)
        assert payload_a.numel() == codec.numel


def test_the_chunk_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one tensor and of several are drawn by different arithmetic."""
    layout = Layout(("a", "empty", "b", "c"), (500, 0, 3, 2000))
    flat = values((layout.total,))
    payloads = []
    for chunk in (1, 7, 64, 2**15):
        monkeypatch.setattr(random_k, "CHUNK", chunk)
        codec, payload = at_step(RandomK(0.2), layout, torch.float32, 3)
        codec.encode(flat, payload)
        payloads.append(payload)
    assert all(same_bits(payload, payloads[0]) for payload in payloads)


def test_the_draw_is_independent_of_a_random_blocks() -> None:
    """Users may give both compressors the same seed."""
    places = draws(100, 0.01)[:, 0] // 10
    starts = np.array([RandomBlock(0.01).selection("weight", 100, step)[0] for step in range(STEPS)]) // 10
    assert abs(dependence(places, starts, 10)) < 4.5
