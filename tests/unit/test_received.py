"""Payloads from other ranks whose sizes or places are wrong are refused, with what is wrong with them."""

from __future__ import annotations

from typing import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import (
    BlockSign,
    Cast,
    Compressor,
    CountSketch,
    Identity,
    Layout,
    LowRank,
    Payload,
    RandomBlock,
    RandomK,
    TopK,
)
from hvd_compress.compressors.topk_places import misplaced
from hvd_compress.native import signs, sketch
from tests.unit.receiving import CPU, WRONG, N, loops, wrong

__all__ = ["loops"]  # the fixture
ALL: list[Compressor] = [
    TopK(0.1),
    TopK(0.1, sampled=True),
    BlockSign(),
    BlockSign(7),
    RandomK(0.3),
    RandomBlock(0.3),
    CountSketch(0.5),
    LowRank(1),
    Identity(),
    Cast(),
]


# -- decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("change", ["short", "empty", "one", "long", "matrix", "dtype"])
def test_decode_refuses_payloads_of_another_size(compressor: Compressor, change: str, loops: bool) -> None:
    payload = compressor.encode(torch.randn(10, 5), "w", 3)
    v = payload.values
    odd = {
        "short": v[:-1],
        "empty": v[:0],
        "one": v[:1],
        "long": torch.cat((v, v[:8])),
        "matrix": v.view(1, -1),
        "dtype": v.to(torch.int16),
    }[change]
    with pytest.raises(ValueError, match=f"{type(compressor).__name__}: a payload of shape"):
        compressor.decode(Payload(odd, payload.shape, payload.dtype, payload.context))
    assert compressor.decode(payload).shape == (10, 5)


@wrong
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sampled", [False, True])
def test_decode_refuses_places(kind: str, dtype: torch.dtype, sampled: bool) -> None:
    compressor = TopK(0.1, sampled)
    # A sampled payload begins anywhere; at step 0 the scan passes the end of the vector once.
    v = torch.zeros(N, dtype=dtype)
    v[::10] = torch.tensor([1.0, 2, 3, 4, 5], dtype=dtype)
    payload = compressor.encode(v)
    change, text = WRONG[kind]
    indices = payload.values[5 * dtype.itemsize :].clone().view(torch.int32)
    change(indices)
    payload.values[5 * dtype.itemsize :] = indices.view(torch.uint8)
    with pytest.raises(ValueError, match="TopK: index" if sampled else text):
        compressor.decode(payload)


def test_decode_refuses_another_block() -> None:
    payload = RandomBlock(0.3).encode(torch.randn(N), "w", 3)
    for context in ({"start": -1}, {"start": N}, {"length": 16}, {"start": 2**40}):
        with pytest.raises(ValueError, match=r"RandomBlock: start=.* and length=.* are not allowed"):
            RandomBlock(0.3).decode(
                Payload(payload.values, payload.shape, payload.dtype, {**payload.context, **context})
            )


# -- places ----------------------------------------------------------------------------------------------


@given(
    places=st.lists(st.integers(-2, 12) | st.sampled_from([2**31 - 1, -(2**31)]), min_size=1, max_size=6),
    zeros=st.integers(0, 63),
    sampled=st.booleans(),
)
def test_an_accelerator_refuses_what_the_host_refuses_and_no_place_is_used_twice(
    places: list[int], zeros: int, sampled: bool
) -> None:
    n, k = 10, len(places)
    values = torch.tensor([0.0 if zeros >> j & 1 else 1.0 + j for j in range(k)])
    codec = TopK(k / n, sampled).codec(Layout(("a",), (n,)), torch.float32, CPU)
    payload = torch.zeros(codec.numel, dtype=torch.uint8)
    codec.unpack(payload)[0].copy_(values)
    codec.unpack(payload)[1].copy_(torch.tensor(places, dtype=torch.int32))
    found = codec.flaw(payload)
    rows = torch.stack((payload, payload))
    flawed = codec.disarm(rows)
    assert flawed is not None
    assert flawed.tolist() == [found is not None] * 2
    assert torch.equal(rows[0], payload if found is None else torch.zeros_like(payload))
    used = [place for place, value in zip(places, values) if value]
    sound = all(0 <= place < n for place in places) and len(set(used)) == len(used)
    assert found is not None or sound
    codec.accumulate(rows[0], torch.zeros(n), 1.0)


@given(data=st.data(), sampled=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_payload_that_is_made_is_sound(data: st.DataObject, sampled: bool, dtype: torch.dtype) -> None:
    n = data.draw(st.integers(1, 300))
    v = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, np.nan, np.inf]), min_size=n, max_size=n))
    )
    codec = TopK(data.draw(st.floats(0.01, 1.0)), sampled).codec(Layout(("a",), (n,)), dtype, CPU)
    payload = torch.full((codec.numel,), 255, dtype=torch.uint8)
    codec.set_step(data.draw(st.integers(0, 1000)))
    codec.encode(v.to(dtype), payload)
    assert codec.flaw(payload) is None
    flawed = codec.disarm(payload.unsqueeze(0))
    assert flawed is not None
    assert not flawed.any()
    values, places = codec.unpack(payload)
    assert not misplaced(values.unsqueeze(0), places.unsqueeze(0), n, 1 + sampled).any()


# -- compiled loops --------------------------------------------------------------------------------------


def test_compiled_loops_refuse_offsets_and_ends(loops: bool) -> None:
    if not loops:
        pytest.skip("only of the compiled loops")
    flat, table = torch.ones(10), torch.zeros(1, 4)
    factors = torch.ones(1, 3)
    scratch = torch.zeros(40_000, dtype=torch.int64), torch.zeros(40_000, dtype=torch.int32)
    calls: list[Callable[[Tensor], None]] = [
        lambda offsets: sketch.sketch(flat, table, offsets, factors),
        lambda offsets: sketch.estimate(table, offsets, factors, flat),
        lambda offsets: sketch.largest(table, offsets, factors, 10, 2, *scratch),
    ]
    for bad in (-1, 4, 2**40):
        for call in calls:
            with pytest.raises(ValueError, match=f"offset 1 is {bad}; it must be in"):
                call(torch.tensor([[0, bad, 1]]))
    bits = torch.zeros(2, dtype=torch.uint8)
    for ends in ([4, 4, 10], [4, 3, 10]):
        array = np.array(ends, dtype=np.int64)
        with pytest.raises(ValueError, match="ends of blocks must ascend, and the end of block 1 does not"):
            signs.add(bits, flat, array, np.ones(3, dtype=np.float32))
        with pytest.raises(ValueError, match="ends of blocks"):
            signs.pack(flat, bits, array)
