"""Payload of the random block: exactly the selected coordinates, of a tensor or of a bucket."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Layout, RandomBlock, SummableCodec
from hvd_compress.compressors.random_block import MANY, _Blocks, _ShortBlocksCodec

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

densities = st.one_of(st.just(1.0), st.floats(min_value=1e-4, max_value=1.0))
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
layouts = st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 70)), min_size=1, max_size=9).map(
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


def mask_of(block: RandomBlock, name: str, numel: int, step: int) -> Tensor:
    """Return the mask of the selected coordinates, one by one from the definition."""
    start, length = block.selection(name, numel, step)
    mask = torch.zeros(numel, dtype=torch.bool)
    for i in range(length):
        mask[(start + i) % numel] = True
    return mask


# -- one tensor ----------------------------------------------------------------------------------------


@given(shapes, st.sampled_from(DTYPES), densities, st.integers(0, 9), st.integers(0, 1000))
def test_exactly_the_selected_coordinates_survive(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int, step: int
) -> None:
    block = RandomBlock(density=density, seed=seed)
    v = values(shape, dtype)
    payload = block.encode(v, "w", step)
    kept = block.decode(payload)
    mask = mask_of(block, "w", v.numel(), step).view(shape)

    assert kept.shape == v.shape
    assert kept.dtype == v.dtype
    assert same_bits(kept, torch.where(mask, v, torch.zeros_like(v)))
    assert payload.values.dim() == 1
    assert payload.values.numel() == int(mask.sum())
    assert payload.values.dtype == dtype
    assert payload.nbytes == int(mask.sum()) * v.element_size()

    residual = v - kept
    assert same_bits(kept + residual, v), "mass"
    assert same_bits(residual, torch.where(mask, torch.zeros_like(v), v))
    assert (residual.double() ** 2).sum() <= (v.double() ** 2).sum(), "contraction"


def test_the_contraction_is_density_on_average() -> None:
    """E ||v - C(v)||^2 = (1 - b/n) ||v||^2, for any v; here all of its energy is in one coordinate."""
    block, v = RandomBlock(density=0.25), torch.zeros(40)
    v[11] = 1.0
    steps = 4000
    lost = sum(float((v - block.decode(block.encode(v, "w", step))).square().sum()) for step in range(steps)) / steps
    assert abs(lost - 0.75) < 5 * math.sqrt(0.75 * 0.25 / steps)


@given(st.sampled_from(DTYPES), densities, st.integers(0, 1000))
def test_any_memory_layout(dtype: torch.dtype, density: float, step: int) -> None:
    block, v = RandomBlock(density=density), values((4, 6), dtype)
    for view in (v.t(), v[:, ::2], v[1:, 1:], v.expand(3, 4, 6)):
        assert same_bits(
            block.decode(block.encode(view, "w", step)), block.decode(block.encode(view.contiguous(), "w", step))
        )


@given(st.integers(1, 60), densities, st.integers(0, 1000))
def test_special_values_pass_and_do_not_spread(n: int, density: float, step: int) -> None:
    block = RandomBlock(density=density)
    v = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3e38] * 10)[:n]
    mask = mask_of(block, "w", n, step)
    kept = block.decode(block.encode(v, "w", step))
    assert same_bits(kept[mask], v[mask])
    assert same_bits(kept[~mask], torch.zeros(n - int(mask.sum())))


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_a_payload_is_a_copy(density: float) -> None:
    """A payload must not change when training continues while it is being sent."""
    block, v = RandomBlock(density=density), values((30,))
    payload = block.encode(v, "w", 0)
    before = payload.values.clone()
    v.zero_()
    assert same_bits(payload.values, before)
    kept = block.decode(payload)
    payload.values.zero_()
    assert int((kept != 0).sum()) == before.numel()


@given(shapes, st.sampled_from(DTYPES), st.integers(0, 1000))
def test_density_one_sends_everything(shape: tuple[int, ...], dtype: torch.dtype, step: int) -> None:
    block, v = RandomBlock(density=1), values(shape, dtype)
    assert same_bits(block.decode(block.encode(v, "w", step)), v)


@given(st.integers(1, 80), st.sampled_from(DTYPES), densities, st.integers(0, 1000))
def test_payloads_add_as_tensors_do(n: int, dtype: torch.dtype, density: float, step: int) -> None:
    block, a, b = RandomBlock(density=density), values((n,), dtype, 1), values((n,), dtype, 2)
    pa, pb, both = (block.encode(v, "w", step) for v in (a, b, a + b))
    assert same_bits(pa.values + pb.values, both.values)
    assert torch.equal(block.decode(pa) + block.decode(pb), block.decode(both))


def test_a_hundred_million_elements() -> None:
    """The input is one element, expanded 10^8 times, so only the decoded tensor takes memory."""
    n, block = 10**8, RandomBlock(density=1e-6)
    v = torch.ones(1, dtype=torch.float16).expand(n)
    start, length = block.selection("w", n, 3)
    payload = block.encode(v, "w", 3)
    kept = block.decode(payload)
    assert (length, payload.nbytes, kept.numel()) == (100, 200, n)
    assert start + length < n, "choose a step that does not wrap"
    assert int(torch.count_nonzero(kept)) == length
    assert bool(kept[start : start + length].all())


# -- a bucket ------------------------------------------------------------------------------------------


def decoded(block: RandomBlock, layout: Layout, flat: Tensor, step: int) -> Tensor:
    """Return what a bucket decodes to, computed tensor by tensor."""
    parts = torch.split(flat, list(layout.numels))
    return torch.cat([block.decode(block.encode(p, name, step)) for name, p in zip(layout.names, parts)])


def at_step(block: RandomBlock, layout: Layout, dtype: torch.dtype, step: int) -> tuple[SummableCodec, Tensor]:
    codec = block.codec(layout, dtype, CPU)
    assert isinstance(codec, SummableCodec)
    codec.set_step(step)
    return codec, torch.full((codec.numel,), math.nan, dtype=codec.dtype)


@given(layouts, densities, st.integers(0, 3), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
def test_a_bucket_is_its_tensors(layout: Layout, density: float, seed: int, step: int, dtype: torch.dtype) -> None:
    block = RandomBlock(density=density, seed=seed)
    flat = values((layout.total,), dtype)
    original = flat.clone()
    codec, payload = at_step(block, layout, dtype, step)
    expected = decoded(block, layout, flat, step)

    codec.encode(flat, payload)
    assert same_bits(flat, original), "encode must not touch its input"
    assert codec.dtype == dtype
    assert codec.data_independent
    assert codec.numel == sum(max(1, math.floor(n * density)) if n else 0 for n in layout.numels)
    assert torch.equal(payload.sort().values, expected[expected != 0].sort().values)

    written = torch.zeros_like(flat)
    codec.write(payload, written)
    assert same_bits(written, expected)

    # write leaves the bits of the other coordinates unchanged
    background = values((layout.total,), dtype, seed=5)
    over = background.clone()
    codec.write(payload, over)
    assert same_bits(over, torch.where(expected != 0, expected, background))

    parts = [part.clone() for part in torch.split(background, list(layout.numels))]
    codec.write_tensors(payload, parts)
    assert same_bits(torch.cat(parts), over)

    added = background.clone()
    codec.accumulate(payload, added, -1.5)
    torch.testing.assert_close(added, background - 1.5 * expected)
    assert same_bits(added[expected == 0], background[expected == 0])

    # subtracting what was sent leaves exactly zero
    codec.accumulate(payload, flat, -1.0)
    assert same_bits(flat, torch.where(expected != 0, torch.zeros_like(flat), original))


@given(layouts, densities, st.integers(0, 1000))
def test_bucket_payloads_add(layout: Layout, density: float, step: int) -> None:
    block = RandomBlock(density=density)
    a, b = values((layout.total,), seed=1), values((layout.total,), seed=2)
    codec, payload_a = at_step(block, layout, torch.float32, step)
    payload_b, both = payload_a.clone(), payload_a.clone()
    for flat, payload in ((a, payload_a), (b, payload_b), (a + b, both)):
        codec.encode(flat, payload)
    assert same_bits(payload_a + payload_b, both)


@given(layouts, st.integers(0, 1000))
def test_density_one_sends_the_whole_bucket(layout: Layout, step: int) -> None:
    flat = values((layout.total,))
    codec, payload = at_step(RandomBlock(density=1), layout, torch.float32, step)
    codec.encode(flat, payload)
    out = torch.zeros_like(flat)
    codec.write(payload, out)
    assert codec.numel == layout.total
    assert same_bits(out, flat)


@given(layouts, densities)
def test_the_size_of_the_payload_never_changes(layout: Layout, density: float) -> None:
    """A collective of the same name must have the same size at every step."""
    codec, payload = at_step(RandomBlock(density=density), layout, torch.float32, 0)
    flat = values((layout.total,))
    for step in range(30):
        codec.set_step(step)
        codec.encode(flat, payload)
        assert payload.numel() == codec.numel


@given(layouts, densities, st.integers(0, 1000))
def test_a_tensor_is_cut_alike_in_any_bucket(layout: Layout, density: float, step: int) -> None:
    """The draw depends on names and not on positions, as buckets may be cut differently after a restart."""
    block, flat = RandomBlock(density=density), values((layout.total,))
    turned = Layout(layout.names[::-1], layout.numels[::-1])
    parts = torch.split(flat, list(layout.numels))
    images = []
    for order, vector in ((layout, flat), (turned, torch.cat(parts[::-1]))):
        codec, payload = at_step(block, order, torch.float32, step)
        codec.encode(vector, payload)
        out = torch.zeros_like(vector)
        codec.write(payload, out)
        images.append(dict(zip(order.names, torch.split(out, list(order.numels)))))
    assert all(same_bits(images[0][name], images[1][name]) for name in layout.names)


# -- many small tensors ----------------------------------------------------------------------------------


@given(layouts, densities, st.integers(0, 30), st.sampled_from(DTYPES))
def test_short_blocks_by_an_index_are_the_same(layout: Layout, density: float, step: int, dtype: torch.dtype) -> None:
    """Whatever the number of tensors, the coordinates are those of the definition."""
    block = RandomBlock(density)
    views = block.codec(layout, dtype, CPU)
    index = _ShortBlocksCodec(_Blocks(block, layout), layout, dtype, CPU)
    flat = values((layout.total,), dtype)
    results = []
    for codec in (views, index):
        codec.set_step(step)
        assert isinstance(codec, SummableCodec)
        payload = torch.zeros(codec.numel, dtype=dtype)
        codec.encode(flat, payload)
        cleared, written, added = flat.clone(), torch.zeros_like(flat), flat.clone()
        codec.clear(payload, cleared)
        codec.write(payload, written)
        codec.accumulate(payload, added, 2.0)
        tensors = [torch.zeros(n, dtype=dtype) for n in layout.numels]
        codec.write_tensors(payload, tensors)
        results.append((cleared, written, added, torch.cat(tensors)))
    assert all(same_bits(a, b) for a, b in zip(*results))


def test_the_number_of_tensors_decides() -> None:
    small = Layout(tuple(f"p{i}" for i in range(MANY)), (8,) * MANY)
    assert isinstance(RandomBlock(0.5).codec(small, torch.float32, CPU), _ShortBlocksCodec)
    for other in (Layout(("w",), (MANY * 8,)), Layout(small.names, (10**4,) * MANY)):
        assert not isinstance(RandomBlock(0.5).codec(other, torch.float32, CPU), _ShortBlocksCodec)
