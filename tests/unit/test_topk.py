"""The largest elements, compared with a sorted list for vectors of many kinds, and the contents of a payload."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Codec, Combine, Layout, TopK, topk_search
from hvd_compress.compressors.topk_search import HostSearch, sampled_on_device, scan_start

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDE = [torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

densities = st.one_of(st.just(1.0), st.floats(min_value=1e-3, max_value=1.0))
lengths = st.integers(0, 400)
# Vectors with few different values, many zeros, one value or infinities have ties, and mislead a sampled threshold.
kinds = st.sampled_from(["normal", "few", "zeros", "equal", "ascending", "descending", "special"])


def vector(n: int, kind: str = "normal", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    v = {
        "normal": lambda: rng.standard_normal(n),
        "few": lambda: rng.integers(-2, 3, n),
        "zeros": lambda: rng.standard_normal(n) * (rng.random(n) < 0.02),
        "equal": lambda: np.full(n, -1.5),
        "ascending": lambda: np.arange(n) * 0.5,
        "descending": lambda: -np.arange(n)[::-1] * 0.5,
        "special": lambda: rng.choice([math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, 1e-45], n),
    }[kind]()
    return torch.from_numpy(np.asarray(v, dtype=np.float64)).to(dtype)


def count(n: int, density: float) -> int:
    return max(1, math.floor(n * density)) if n else 0


def largest(v: Tensor, k: int) -> list[int]:
    """Return the indices of the k largest by the definition: nan first, then by magnitude, then by index."""
    numbers = [abs(x) for x in v.reshape(-1).tolist()]
    order = sorted(range(len(numbers)), key=lambda i: (not math.isnan(numbers[i]), -numbers[i], i))
    return sorted(order[:k])


def same_bits(a: Tensor, b: Tensor) -> bool:
    width = BITS[a.element_size()]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def at_step(topk: TopK, layout: Layout, dtype: torch.dtype, step: int) -> tuple[Codec, Tensor]:
    codec = topk.codec(layout, dtype, CPU)
    codec.set_step(step)
    return codec, torch.full((codec.numel,), 255, dtype=torch.uint8)


def parts(payload: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, indices and padding of a codec's payload."""
    middle = k * dtype.itemsize
    return payload[:middle].view(dtype), payload[middle : middle + 4 * k].view(torch.int32), payload[middle + 4 * k :]


# -- one tensor ----------------------------------------------------------------------------------------


def test_properties() -> None:
    topk, v = TopK(density=0.01), vector(300)
    assert topk.combine is Combine.GATHER
    assert topk.is_sparsifier
    assert topk.payload_ratio == 0.02
    assert not torch.equal(topk.decode(topk.encode(v)), v), "lossy"


@given(lengths, kinds, st.sampled_from(DTYPES), densities)
def test_exactly_the_largest_survive(n: int, kind: str, dtype: torch.dtype, density: float) -> None:
    topk, v, k = TopK(density), vector(n, kind, dtype), count(n, density)
    payload = topk.encode(v)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[largest(v, k)] = True
    expected = torch.where(mask, v, torch.zeros_like(v))
    kept = topk.decode(payload)

    assert (kept.dtype, kept.shape) == (v.dtype, v.shape)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
    assert payload.values.dtype == torch.uint8
    assert payload.values.dim() == 1
    assert payload.nbytes == k * (4 + dtype.itemsize)
    places = payload.values[k * dtype.itemsize :].clone().view(torch.int32)
    assert places.tolist() == largest(v, k), "ascending"
    if kind != "special":
        residual = v - kept
        assert same_bits(kept + residual, v + 0.0), "mass"
        norm = float((v.double() ** 2).sum())
        assert float((residual.double() ** 2).sum()) <= (1 - k / max(n, 1)) * norm * (1 + 1e-12), "contraction"


@pytest.mark.parametrize("dtype", WIDE)
@given(st.integers(1, 3000), kinds, densities, st.integers(0, 3))
def test_exact_with_thresholds_from_thin_samples(
    dtype: torch.dtype, n: int, kind: str, density: float, seed: int
) -> None:
    """Small tiles and samples search short vectors in the same way as long ones; the sample may mislead."""
    v, k = vector(n, kind, dtype, seed), count(n, density)
    with mock.patch.multiple(topk_search, TILE=64, _SAMPLE=16):
        assert HostSearch(n).largest(v, k).tolist() == largest(v, k)


def test_exact_in_a_long_vector_whose_sample_misleads() -> None:
    n = 1_000_000
    v, k = vector(n), 10_000
    distance = topk_search.stride(n)
    assert distance > 1
    for factor in (0.0, 100.0):  # the sample sees only small ones, or only large ones
        w = v.clone()
        w[::distance] *= factor
        found = HostSearch(n).largest(w, k)
        smallest = w[found].abs().min()
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == k
        assert int((w.abs() > smallest).sum()) < k


def test_every_branch_for_long_vectors_is_tested() -> None:
    assert topk_search.stride(4095) == topk_search.stride(8191) == 1
    assert [topk_search.stride(n) for n in (3 * 4096, 64 * 4096, 10**6, 10**9)] == [3, 63, 97, 97]
    assert all(-(-n // topk_search.stride(n)) >= min(n, max(4096, n // 100)) for n in range(1, 10**6, 997))


@given(st.sampled_from(DTYPES), densities)
def test_any_memory_layout(dtype: torch.dtype, density: float) -> None:
    topk, v = TopK(density), vector(24, dtype=dtype).view(4, 6)
    for view in (v.t(), v[:, ::2], v[1:, 1:], v.expand(3, 4, 6), v[:, 3], v[0, 0]):
        expected = topk.decode(topk.encode(view.contiguous()))
        assert expected.shape == view.shape
        assert same_bits(topk.decode(topk.encode(view)), expected)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_payload_is_a_copy(density: float, sampled: bool) -> None:
    """A payload must not change when training continues while it is being sent."""
    topk, v = TopK(density, sampled), vector(30)
    payload = topk.encode(v)
    before = payload.values.clone()
    kept = topk.decode(payload)
    v.zero_()
    assert torch.equal(payload.values, before)
    payload.values.zero_()
    assert int((kept != 0).sum()) == count(30, density)


def test_gradients_do_not_flow_through_a_payload() -> None:
    v = vector(30).requires_grad_()
    assert not TopK().decode(TopK().encode(v)).requires_grad


# -- a bucket ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), kinds, densities, st.sampled_from(WIDE), st.booleans())
def test_a_bucket_is_one_long_tensor(
    numels: list[int], kind: str, density: float, dtype: torch.dtype, sampled: bool
) -> None:
    layout = Layout(tuple(map(str, range(len(numels)))), tuple(numels))
    topk, n, step = TopK(density, sampled), layout.total, 3
    flat, k = vector(n, kind, dtype), count(n, density)
    before = flat.clone()
    codec, payload = at_step(topk, layout, dtype, step)
    codec.encode(flat, payload)
    assert same_bits(flat, before), "encode must not touch its input"
    assert (codec.dtype, codec.numel % 8) == (torch.uint8, 0)
    assert 0 <= codec.numel - k * (4 + dtype.itemsize) < 8
    assert torch.equal(payload[: k * (4 + dtype.itemsize)], topk.encode(flat, "", step).values)
    assert not parts(payload, k, dtype)[2].any(), "padding"

    decoded, background = topk.decode(topk.encode(flat, "", step)), vector(n, dtype=dtype, seed=5)
    if kind == "special":
        return
    added = background.clone()
    codec.accumulate(payload, added, -1.5)
    torch.testing.assert_close(added, background - 1.5 * decoded)
    assert same_bits(added[decoded == 0], background[decoded == 0])

    # subtracting what was sent leaves exactly zero there, and the rest unchanged
    values, places, _ = parts(payload, k, dtype)
    sent = torch.zeros(n, dtype=torch.bool)
    sent[(places[values != 0] if sampled else places).long()] = True
    momentum = torch.full((n,), 0.5, dtype=dtype)
    codec.clear(payload, momentum)
    assert torch.equal(momentum == 0, sent), "cleared where something was sent, and nowhere else"
    codec.accumulate(payload, flat, -1.0)
    assert bool((flat[sent] == 0).all())
    assert same_bits(flat[~sent], before[~sent])


@pytest.mark.parametrize("sampled", [False, True])
def test_the_size_of_the_payload_never_changes(sampled: bool) -> None:
    codec, payload = at_step(TopK(0.1, sampled), Layout(("a", "b"), (300, 41)), torch.float32, 0)
    for step, kind in enumerate(["normal", "zeros", "equal", "special", "few", "ascending"]):
        codec.set_step(step)
        codec.encode(vector(341, kind), payload)
        assert payload.numel() == codec.numel


def test_vectors_too_long_for_int32_indices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TopK: .*2147483648 elements.*fewer than 2\*\*31"):
        TopK(1e-9).codec(Layout(("a",), (2**31,)), torch.float32, torch.device("meta"))


# -- sampled -------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), kinds, densities, st.integers(0, 1000), st.sampled_from(WIDE))
def test_sampled_follows_its_definition(n: int, kind: str, density: float, step: int, dtype: torch.dtype) -> None:
    """The first k non-zero elements from the start on that reach the sample's threshold are sent.

    The host's search and the device's are both checked.
    """
    v, k, start = vector(n, kind, dtype), count(n, density), scan_start(step, n)
    with mock.patch.multiple(topk_search, TILE=64, _SAMPLE=16):
        found = HostSearch(n).sampled(v, k, start).tolist()
        places, values = sampled_on_device(v, k, start, torch.arange(1, k + 1, dtype=torch.int32))
        sample, rank = v[:: topk_search.stride(n)], topk_search.sample_rank(n, k)
    numbers = [math.inf if math.isnan(x) else abs(x) for x in v.tolist()]
    has_nan = bool(v.isnan().any())
    if not has_nan:
        threshold = sorted((abs(x) for x in sample.tolist()), reverse=True)[rank - 1]
        scan = [(start + i) % n for i in range(n)]
        assert found == [i for i in scan if numbers[i] >= threshold and numbers[i] > 0][:k]
    unused = k - len(found)
    assert places.tolist() == found + [0] * unused
    torch.testing.assert_close(values[: len(found)], v[found], rtol=0, atol=0, equal_nan=True)
    assert not values[len(found) :].any()


def test_short_vectors_are_their_own_sample() -> None:
    v = vector(4000)
    assert torch.equal(
        TopK(0.01, sampled=True).decode(TopK(0.01, sampled=True).encode(v)), TopK(0.01).decode(TopK(0.01).encode(v))
    )


def test_how_many_a_sampled_threshold_lets_pass() -> None:
    """The figures of the docstring hold: standard deviation 1 / sqrt(m density), of which 0.4 remains empty."""
    n, density, trials = 400_000, 0.01, 60
    deviation = 1 / math.sqrt(n / topk_search.stride(n) * density)
    assert 0.15 < deviation < 0.17
    k, search, sent = count(n, density), HostSearch(n), []
    for trial in range(trials):
        v = torch.randn(n, generator=torch.Generator().manual_seed(trial))
        sent.append(len(search.sampled(v, k, 0)) / k)
    shortfall = 1 - float(np.mean(sent))
    assert 0.6 * 0.4 * deviation < shortfall < 1.6 * 0.4 * deviation
    assert min(sent) > 1 - 4 * deviation


def test_a_sampled_payload_is_nearly_as_good_as_the_exact_one() -> None:
    v = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    lost = [float((v - topk.decode(topk.encode(v))).square().sum()) for topk in (TopK(), TopK(sampled=True))]
    norm = float(v.square().sum())
    assert lost[0] <= lost[1] <= lost[0] + 0.3 * (norm - lost[0])
    assert lost[1] < (1 - 0.01) * norm


def test_the_scan_begins_everywhere() -> None:
    """If more elements reach the threshold than are sent, each of them is sent at some step."""
    starts = np.array([scan_start(step, 1000) for step in range(3000)])
    histogram = np.bincount(starts // 100, minlength=10)
    assert histogram.sum() == 3000
    assert np.all(np.abs(histogram - 300) < 5 * math.sqrt(300))
    v, topk, sent = torch.ones(1000), TopK(0.05, sampled=True), torch.zeros(1000)
    for step in range(300):
        sent += topk.decode(topk.encode(v, "w", step))
    assert bool((sent > 0).all())


def test_unused_slots_are_zeros() -> None:
    topk, v = TopK(0.5, sampled=True), torch.zeros(100)
    v[7] = -2.0
    codec, payload = at_step(topk, Layout(("a",), (100,)), torch.float32, 0)
    codec.encode(v, payload)
    values, places, _ = parts(payload, 50, torch.float32)
    assert values.tolist() == [-2.0] + [0.0] * 49
    assert places.tolist() == [7] + [0] * 49
