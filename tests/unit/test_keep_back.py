"""What a rank keeps back is what it had less what it sent, and of what is no number, once sent, nothing."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress.compressors import BlockSign, Cast, Codec, Compressor, Identity, Layout, RandomBlock, RandomK, TopK
from hvd_compress.native import signs

LAYOUT = Layout(("a", "empty", "b", "c"), (40, 0, 1, 9))
CPU = torch.device("cpu")
LOADED = signs._signs
compressors = pytest.mark.parametrize("compressor", [
    Identity(), Cast(), Cast(torch.float32), RandomBlock(0.3), RandomK(0.3), TopK(0.2), TopK(0.2, sampled=True),
    BlockSign(), BlockSign(block_size=7),
], ids=str)  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True, params=["torch", "native"] if LOADED else ["torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_signs", LOADED if request.param == "native" else None)


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(50, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@compressors
@dtypes
def test_it_is_what_decoding_takes_off(compressor: Compressor, dtype: torch.dtype) -> None:
    codec = compressor.codec(LAYOUT, dtype, CPU)
    shards = compressor.sharded(LAYOUT, [0, 16, 40, 50], dtype, CPU)
    assert isinstance(codec, Codec)
    wire = torch.zeros(codec.numel, dtype=codec.dtype)
    wires = [torch.zeros(c.numel, dtype=c.dtype) for c in shards.codecs]
    for step in range(4):
        flat = values(dtype, step)
        codec.begin(step)
        codec.encode(flat, wire)
        kept, expected = flat.clone(), flat.clone()
        codec.keep_back(wire, kept)
        codec.accumulate(wire, expected, -1.0)
        assert torch.equal(kept, expected)
        shards.begin(step)
        shards.encode(flat, wires)
        kept, expected = flat.clone(), flat.clone()
        shards.keep_back(wires, kept)
        shards.accumulate(wires, expected, -1.0)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@compressors
@dtypes
def test_what_is_no_number_leaves_when_it_is_sent(compressor: Compressor, dtype: torch.dtype, bad: float) -> None:
    if getattr(compressor, "sampled", False):
        pytest.skip("its empty places look like sent ones")
    codec, flat = compressor.codec(LAYOUT, dtype, CPU), values(dtype, 9)
    shards, parts = compressor.sharded(LAYOUT, [0, 16, 40, 50], dtype, CPU), flat.clone()
    assert isinstance(codec, Codec)
    for vector in (flat, parts):
        vector[[3, 45]] = bad
    wire = torch.zeros(codec.numel, dtype=codec.dtype)
    wires = [torch.zeros(c.numel, dtype=c.dtype) for c in shards.codecs]
    for step in range(200):
        codec.begin(step)
        codec.encode(flat, wire)
        codec.keep_back(wire, flat)
        shards.begin(step)
        shards.encode(parts, wires)
        shards.keep_back(wires, parts)
    assert bool(flat.isfinite().all()), flat
    assert bool(parts.isfinite().all()), parts
