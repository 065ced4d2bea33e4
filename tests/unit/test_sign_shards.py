"""Scaled signs of a bucket that is cut into shards."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress.compressors import BlockSign
from tests.unit.signing import CPU, WIDE, blocks, encoded, examples, loops, named, numbers, sizes, vector

__all__ = ["loops"]  # the fixture


@examples
@given(numbers, sizes, st.sampled_from(WIDE), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 9))
def test_shards_decode_to_the_whole(
    numels: list[int], size: Optional[int], dtype: torch.dtype, cuts: list[int], seed: int
) -> None:
    compressor, layout = BlockSign(size), named(numels)
    n = layout.total
    borders = [0, *sorted(min(8 * cut, n) for cut in cuts), n]
    flat, background = vector(n, dtype, seed), vector(n, dtype, seed + 1)
    whole, expected = compressor.codec(layout, dtype, CPU), background.clone()
    whole.accumulate(encoded(whole, flat), expected, -0.3)

    shards = compressor.sharded(layout, borders, dtype, CPU)
    assert shards.borders == borders
    payloads = [torch.full((codec.numel,), 255, dtype=codec.dtype) for codec in shards.codecs]
    shards.set_step(0)
    shards.encode(flat, payloads)
    for j, (codec, payload) in enumerate(zip(shards.codecs, payloads)):
        codec.accumulate(payload, shards.shard(background, j), -0.3)
        start, stop = borders[j], borders[j + 1]
        touched = sum(b.start < stop and b.stop > start for b in blocks(numels, size)) if start < stop else 0
        at = (stop - start + 31) // 32 * 4
        assert codec.numel == -(-(at + 4 * touched) // 8) * 8
        assert not payload[-(-(stop - start) // 8) : at].any() and not payload[at + 4 * touched :].any(), "padding"
    assert torch.equal(background, expected)


def test_borders_within_a_byte_are_refused() -> None:
    with pytest.raises(ValueError, match=r"borders=\[0, 12, 20\].*multiples of 8"):
        BlockSign().sharded(named([20]), [0, 12, 20], torch.float32, CPU)


def test_a_shard_by_itself_has_blocks_of_its_own() -> None:
    """The codec of a cut layout computes scales from its own elements only."""
    layout, flat = named([16]), torch.cat((torch.full((8,), 1.0), torch.full((8,), 3.0)))
    out = torch.zeros(8)
    codec = BlockSign().codec(layout.cut(8, 16), torch.float32, CPU)
    codec.accumulate(encoded(codec, flat[8:]), out, 1.0)
    assert out.tolist() == [3.0] * 8
    shards = BlockSign().sharded(layout, [0, 8, 16], torch.float32, CPU)
    payloads = [torch.empty(codec.numel, dtype=torch.uint8) for codec in shards.codecs]
    shards.encode(flat, payloads)
    out.zero_()
    shards.codecs[1].accumulate(payloads[1], out, 1.0)
    assert out.tolist() == [2.0] * 8
