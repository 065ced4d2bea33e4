"""Scaled signs, compared with plain numpy: compiled loops and torch's operations, single tensors and buckets."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress import native
from hvd_compress.compressors import BlockSign, Combine
from hvd_compress.native import signs
from tests.unit.signing import (
    CPU,
    DTYPES,
    WIDE,
    blocks,
    encoded,
    examples,
    loops,
    named,
    numbers,
    reference,
    sizes,
    spread,
    unpack,
    vector,
)

__all__ = ["loops"]  # the fixture

# -- one tensor ----------------------------------------------------------------------------------------


def test_properties() -> None:
    assert BlockSign().combine is Combine.GATHER
    assert not BlockSign().is_sparsifier
    assert not torch.equal(BlockSign().decode(BlockSign().encode(vector(40))), vector(40)), "lossy"
    assert BlockSign().payload_ratio == 1 / 32
    assert BlockSign(64).payload_ratio == 1 / 32 + 1 / 64


@examples
@given(st.integers(0, 200), st.sampled_from(DTYPES), sizes, st.integers(0, 9))
def test_the_definition(n: int, dtype: torch.dtype, size: Optional[int], seed: int) -> None:
    compressor, v = BlockSign(size), vector(n, dtype, seed)
    places = blocks([n], size)
    payload = compressor.encode(v)
    assert payload.values.dtype == torch.uint8
    assert payload.nbytes == -(-n // 8) + 4 * len(places)

    scales, sign = unpack(payload.values, n, len(places), -(-n // 8))
    wanted, wanted_sign = reference(v.double().numpy(), places)
    np.testing.assert_array_equal(sign, wanted_sign)
    np.testing.assert_allclose(scales, wanted, rtol=1e-5, atol=1e-30)
    back = compressor.decode(payload)
    assert (back.dtype, back.shape) == (v.dtype, v.shape)
    expected = torch.from_numpy(spread(scales, places, n) * sign).to(dtype)
    assert torch.equal(back, expected)


@examples
@given(st.integers(1, 200), st.sampled_from(WIDE), sizes)
def test_the_contraction(n: int, dtype: torch.dtype, size: Optional[int]) -> None:
    """In each block ||v - C(v)||^2 = ||v||^2 - ||v||_1^2 / n, so it is at most (1 - 1/n) ||v||^2."""
    v = vector(n, dtype, 1)
    kept = BlockSign(size).decode(BlockSign(size).encode(v))
    for place in blocks([n], size):
        b, lost = v[place].double(), float((v[place].double() - kept[place].double()).square().sum())
        norm, m = float(b.square().sum()), b.numel()
        assert lost == pytest.approx(norm - float(b.abs().sum()) ** 2 / m, rel=1e-5, abs=1e-6 * norm)
        assert lost <= (1 - 1 / m) * norm + 1e-6 * norm


def test_the_contraction_of_normal_values() -> None:
    v = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    lost = (v - BlockSign().decode(BlockSign().encode(v))).square().sum() / v.square().sum()
    assert abs(float(lost) - (1 - 2 / math.pi)) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [None, 3])
def test_zeros_and_values_that_are_not_finite(dtype: torch.dtype, size: Optional[int]) -> None:
    compressor = BlockSign(size)
    zeros = compressor.decode(compressor.encode(torch.tensor([0.0, -0.0, 0.0, 0.0], dtype=dtype)))
    assert zeros.tolist() == [0.0] * 4
    v = torch.tensor([1.0, -0.0, -2.0, 1.0, math.nan, 1.0, -math.inf, 0.0, 3.0], dtype=dtype)
    back = compressor.decode(compressor.encode(v))
    if size is None:
        assert bool(back.isnan().all())
    else:
        assert back[:3].tolist() == [1.0, 1.0, -1.0]
        assert bool(back[3:6].isnan().all())
        assert back[6:].tolist() == [-math.inf, math.inf, math.inf]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_layout(dtype: torch.dtype, size: Optional[int]) -> None:
    compressor, v = BlockSign(size), vector(24, dtype).view(4, 6)
    for view in (v.t(), v[:, ::2], v[1:, 1:], v.expand(3, 4, 6), v[:, 3], v[0, 0], v[:, :0]):
        back = compressor.decode(compressor.encode(view))
        assert back.shape == view.shape
        assert torch.equal(back, compressor.decode(compressor.encode(view.contiguous())))


def test_a_payload_is_a_copy() -> None:
    """A payload must not change when training continues while it is being sent."""
    v = vector(30)
    payload = BlockSign(7).encode(v)
    before, kept = payload.values.clone(), BlockSign(7).decode(payload)
    again = kept.clone()
    v.fill_(-9)
    assert torch.equal(payload.values, before)
    payload.values.zero_()
    assert torch.equal(kept, again)
    assert not BlockSign().decode(BlockSign().encode(v.requires_grad_())).requires_grad


# -- a bucket ------------------------------------------------------------------------------------------


@examples
@given(numbers, sizes, st.sampled_from(WIDE), st.integers(0, 9))
def test_a_bucket_is_its_tensors(numels: list[int], size: Optional[int], dtype: torch.dtype, seed: int) -> None:
    compressor, layout = BlockSign(size), named(numels)
    n, places = layout.total, blocks(numels, size)
    flat = vector(n, dtype, seed)
    before = flat.clone()
    codec = compressor.codec(layout, dtype, CPU)
    payload = encoded(codec, flat)
    assert torch.equal(flat, before), "encode must not touch its input"
    assert codec.dtype == torch.uint8
    at = (n + 31) // 32 * 4
    assert codec.numel == -(-(at + 4 * len(places)) // 8) * 8
    assert not payload[-(-n // 8) : at].any() and not payload[at + 4 * len(places) :].any(), "padding"

    scales, sign = unpack(payload, n, len(places), at)
    parts = torch.split(flat, numels) if numels else ()
    decoded = torch.cat([flat[:0], *(compressor.decode(compressor.encode(part)) for part in parts)])
    np.testing.assert_array_equal(sign, reference(flat.numpy(), places)[1])
    values = spread(scales, places, n) * sign
    np.testing.assert_allclose(values, decoded.numpy(), rtol=1e-6)

    # The factor is computed once per block, and added once per element.
    factors = scales.astype(flat.numpy().dtype) * flat.numpy().dtype.type(-1.5)
    added = vector(n, dtype, seed + 1)
    expected = added.numpy() + spread(factors, places, n) * sign.astype(factors.dtype)
    codec.accumulate(payload, added, -1.5)
    np.testing.assert_array_equal(added.numpy(), expected)

    # The residual is v - C(v), to the last bit.
    codec.accumulate(payload, flat, -1.0)
    np.testing.assert_array_equal(flat.numpy(), before.numpy() - values.astype(before.numpy().dtype))


@pytest.mark.parametrize("size", [None, 1000, 5])
@pytest.mark.parametrize("dtype", WIDE)
def test_long_vectors(dtype: torch.dtype, size: Optional[int]) -> None:
    """The vector spans several tiles of the compiled loops, and blocks end at odd indices."""
    numels = [100_003, 1, 0, 33, 70_000, 4096]
    flat, places = vector(sum(numels), dtype, 3), blocks(numels, size)
    codec = BlockSign(size).codec(named(numels), dtype, CPU)
    payload, out = encoded(codec, flat), torch.zeros_like(flat)
    codec.accumulate(payload, out, 1.0)
    scales, sign = reference(flat.numpy(), places)
    np.testing.assert_allclose(out.numpy(), spread(scales, places, len(flat)) * sign, rtol=2e-5)
    assert torch.equal(encoded(codec, flat), payload), "the same every time"


@pytest.mark.parametrize("size", [None, 2_000_000, 1000])
def test_scales_of_millions(size: Optional[int]) -> None:
    """A sum in float32, one element after the other, would be wrong by a thousandth and more."""
    v = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    codec = BlockSign(size).codec(named([len(v)]), torch.float32, CPU)
    exact = v.double().abs().view(-1, size or len(v)).mean(1)
    scales = encoded(codec, v)[len(v) // 8 :].view(torch.float32)[: len(exact)]
    np.testing.assert_allclose(scales.numpy(), exact.numpy(), rtol=2e-7)


def test_threads_cut_at_whole_bytes(loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numels = [5003, 1, 77, 12_000]
    flat = vector(sum(numels))
    codec = BlockSign(100).codec(named(numels), torch.float32, CPU)
    payload, out = encoded(codec, flat), flat.clone()
    codec.accumulate(payload, out, 0.5)
    monkeypatch.setattr(native, "GRAIN", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert native.threads(len(flat), len(flat)) == 3
    other, threaded = encoded(codec, flat), flat.clone()
    codec.accumulate(payload, threaded, 0.5)
    assert torch.equal(out, threaded)
    at = -(-len(flat) // 32) * 4
    assert torch.equal(other[:at], payload[:at])
    torch.testing.assert_close(other[at:].view(torch.float32), payload[at:].view(torch.float32))
    assert torch.equal(encoded(codec, flat), other)


def test_the_loops_refuse_what_does_not_fit(loops: str) -> None:
    v, bits, ends = torch.zeros(20), torch.zeros(3, dtype=torch.uint8), np.array([20])
    for flat, packed, where in (
        (v[:17], bits, ends),
        (v, bits[:2], ends),
        (v, bits, ends[:0]),
        (v, bits, ends + 1),
        (v, bits, ends.astype(np.int32)),
    ):
        with pytest.raises(ValueError, match="blocks"):
            signs.pack(flat, packed, where)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 float32 factors"):
        signs.add(bits, v, ends, np.zeros(2, dtype=np.float32))
    assert signs.applies(v, bits) == (loops == "native")
    assert not signs.applies(v.double(), bits)
    assert not signs.applies(v[::2], bits)


def test_it_works_without_the_extension(loops: str) -> None:
    """Compiled loops and torch write the same bits of signs."""
    flat = vector(1000)
    codec = BlockSign(64).codec(named([990, 10]), torch.float32, CPU)
    payload = encoded(codec, flat)
    bits = np.packbits(flat.numpy() >= 0, bitorder="little")
    assert payload[:125].tolist() == bits.tolist()
