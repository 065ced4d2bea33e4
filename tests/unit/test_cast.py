"""Compressors that send every element: Identity changes nothing, Cast rounds, saturates and keeps nan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Cast, Combine, Compressor, Identity, Layout, SummableCodec

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUT = Layout(("a", "empty", "b", "c"), (5, 0, 1, 7))
FP16_MAX = 65504.0
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)


def there_and_back(compressor: Compressor, v: Tensor) -> Tensor:
    return compressor.decode(compressor.encode(v, "w", 3))


def summing(compressor: Compressor, layout: Layout, dtype: torch.dtype) -> SummableCodec:
    codec = compressor.codec(layout, dtype, CPU)
    assert isinstance(codec, SummableCodec)
    return codec


def through_codec(compressor: Compressor, flat: Tensor, layout: Layout = LAYOUT) -> Tensor:
    codec = summing(compressor, layout, flat.dtype)
    codec.set_step(0)
    payload = torch.full((codec.numel,), math.nan, dtype=codec.dtype)
    codec.encode(flat, payload)
    return payload


@pytest.mark.parametrize("compressor", [Identity(), Cast(), Cast(torch.float32)])
def test_properties(compressor: Compressor) -> None:
    assert compressor.combine is Combine.SUM
    assert not compressor.is_sparsifier
    assert not summing(compressor, LAYOUT, torch.float32).data_independent


# -- Identity ------------------------------------------------------------------------------------------


@given(shapes, st.sampled_from(DTYPES))
def test_identity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v = values(shape, dtype)
    payload = Identity().encode(v)
    back = Identity().decode(payload)
    assert (back.dtype, back.shape) == (v.dtype, v.shape)
    assert torch.equal(back, v)
    assert payload.nbytes == v.numel() * v.element_size()


@pytest.mark.parametrize("compressor", [Identity(), Cast(), Cast(torch.float32)])
def test_a_payload_is_a_copy_of_any_strides(compressor: Compressor) -> None:
    """A payload must not change when training continues while it is being sent."""
    for view in (lambda v: v, lambda v: v.t(), lambda v: v[:, ::2]):
        v = values((4, 6)).half().float()
        payload = compressor.encode(view(v))
        expected = view(v).clone()
        v.zero_()
        assert torch.equal(compressor.decode(payload), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_codec(dtype: torch.dtype) -> None:
    flat, target = values((13,), dtype), values((13,), dtype, 3.0)
    payload = through_codec(Identity(), flat)
    assert payload.dtype == dtype
    assert torch.equal(payload, flat)

    codec, added, written = Identity().codec(LAYOUT, dtype, CPU), target.clone(), target.clone()
    codec.accumulate(payload, added, -0.5)
    codec.write(payload, written)
    torch.testing.assert_close(added, target - 0.5 * flat)
    assert torch.equal(written, flat)


# -- Cast ----------------------------------------------------------------------------------------------


@given(shapes, st.sampled_from(DTYPES), st.sampled_from([torch.float16, torch.float32]))
def test_cast_round_trip(shape: tuple[int, ...], dtype: torch.dtype, sent: torch.dtype) -> None:
    v = values(shape, dtype)
    payload = Cast(sent).encode(v)
    back = Cast(sent).decode(payload)
    assert payload.values.dtype == sent
    assert payload.nbytes == v.numel() * sent.itemsize
    assert (back.dtype, back.shape) == (v.dtype, v.shape)
    assert torch.equal(back, v.to(sent).to(dtype)), "rounded to nearest"
    assert torch.equal(there_and_back(Cast(sent), back), back), "rounding twice is rounding once"


@given(st.lists(st.floats(min_value=-FP16_MAX, max_value=FP16_MAX, width=32), min_size=1, max_size=40))
def test_cast_error_is_half_a_unit_in_the_last_place(numbers: list[float]) -> None:
    v = torch.tensor(numbers)
    error = (v.double() - there_and_back(Cast(), v).double()).abs()
    info = torch.finfo(torch.float16)
    smallest = info.smallest_normal * info.eps  # spacing of the subnormal numbers
    assert bool((error <= torch.clamp(v.double().abs() * info.eps / 2, min=smallest / 2)).all())


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_cast_is_a_contraction_with_exact_mass(numbers: list[float]) -> None:
    v = torch.tensor(numbers)
    v = v[torch.isfinite(v)]
    kept = there_and_back(Cast(), v)
    assert bool(((v - kept).abs() <= v.abs()).all())
    assert torch.equal(kept + (v - kept), v)


OVERFLOWS = [
    (torch.float32, torch.float16, [7e4, -7e4, 3e38, -3e38, 65519.0, 65520.0]),
    (torch.float64, torch.float16, [7e4, -7e4, 1e300, -1e300]),
    (torch.float64, torch.float32, [1e39, -1e39, 1e300]),
    (torch.bfloat16, torch.float16, [7e4, -7e4, 3e38]),
]


@pytest.mark.parametrize(("dtype", "payload", "numbers"), OVERFLOWS)
def test_cast_saturates(dtype: torch.dtype, payload: torch.dtype, numbers: list[float]) -> None:
    v = torch.tensor(numbers, dtype=dtype)
    sent = Cast(payload).encode(v).values
    assert torch.equal(sent, torch.sign(v).to(payload) * torch.finfo(payload).max)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(through_codec(Cast(payload), v, Layout(("w",), (len(numbers),))), sent)


@pytest.mark.parametrize("payload", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_so(dtype: torch.dtype, payload: torch.dtype) -> None:
    """An infinity must not be saturated: its finite value would be sent again at every later step."""
    v = torch.tensor([1.0, math.nan, -2.0, math.inf, -math.inf], dtype=dtype)
    assert torch.isfinite(there_and_back(Cast(payload), v)).tolist() == [True, False, True, False, False]
    flat = torch.tensor([math.nan, -math.inf, *range(11)], dtype=torch.float64)
    assert torch.isfinite(through_codec(Cast(payload), flat)).tolist() == [False] * 2 + [True] * 11


def test_an_upward_cast_changes_nothing() -> None:
    v = torch.tensor([math.inf, -math.inf, FP16_MAX, 6e-8], dtype=torch.float16)
    assert torch.equal(there_and_back(Cast(torch.float32), v), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("payload_dtype", [torch.float16, torch.float32])
def test_cast_codec_agrees_with_the_tensors(dtype: torch.dtype, payload_dtype: torch.dtype) -> None:
    cast, flat, target = Cast(payload_dtype), values((13,), dtype, 1e4), values((13,), dtype, 3.0)
    before = flat.clone()
    payload = through_codec(cast, flat)
    assert torch.equal(flat, before)
    parts = [there_and_back(cast, part) for part in torch.split(flat, list(LAYOUT.numels))]
    decoded = torch.cat(parts)

    codec, added, written = cast.codec(LAYOUT, dtype, CPU), target.clone(), target.clone()
    assert (codec.dtype, codec.numel) == (payload_dtype, 13)
    codec.write(payload, written)
    assert torch.equal(written, decoded)
    scattered = [torch.empty_like(part) for part in parts]
    codec.write_tensors(payload, scattered)
    assert torch.equal(torch.cat(scattered), decoded)
    codec.accumulate(payload, added, 2.0)
    torch.testing.assert_close(added, target + 2.0 * decoded)

    # The residual is exactly the rounding error.
    residual = flat.clone()
    codec.accumulate(payload, residual, -1.0)
    assert torch.equal(residual, flat - decoded)
