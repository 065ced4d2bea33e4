"""The residual after an exchange: the vector minus what was sent, and no inf or nan that was sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hvd_compress.compressors import BlockSign, Cast, Codec, Compressor, Identity, Layout, RandomBlock, RandomK, TopK
from tests.unit.signing import loops

__all__ = ["loops"]  # the fixture

LAYOUT = Layout(("a", "empty", "b", "c"), (40, 0, 1, 9))
CPU = torch.device("cpu")
compressors = pytest.mark.parametrize(
    "compressor",
    [
        Identity(),
        Cast(),
        Cast(torch.float32),
        RandomBlock(0.3),
        RandomK(0.3),
        TopK(0.2),
        TopK(0.2, sampled=True),
        BlockSign(),
        BlockSign(block_size=7),
    ],
    ids=str,
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(50, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def coders(compressor: Compressor, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """Return the codec of a bucket and that of its shards, each with memory for its payload."""
    codec, shards = compressor.codec(LAYOUT, dtype, CPU), compressor.sharded(LAYOUT, [0, 16, 40, 50], dtype, CPU)
    assert isinstance(codec, Codec)
    payload, *payloads = (torch.zeros(c.numel, dtype=c.dtype) for c in (codec, *shards.codecs))
    return [(codec, payload), (shards, payloads)]


@compressors
@dtypes
def test_subtracting_is_decoding_with_a_negative_sign(compressor: Compressor, dtype: torch.dtype) -> None:
    pairs = coders(compressor, dtype)
    for step in range(4):
        for coder, message in pairs:
            kept, expected = values(dtype, step), values(dtype, step)
            coder.set_step(step)
            coder.encode(kept, message)
            coder.subtract_sent(message, kept)
            coder.accumulate(message, expected, -1.0)
            assert torch.equal(kept, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@compressors
@dtypes
def test_values_that_are_not_finite_do_not_remain(compressor: Compressor, dtype: torch.dtype, bad: float) -> None:
    if getattr(compressor, "sampled", False):
        pytest.skip("unused slots cannot be told from index 0")
    for coder, message in coders(compressor, dtype):
        flat = values(dtype, 9)
        flat[[3, 45]] = bad
        for step in range(200):
            coder.set_step(step)
            coder.encode(flat, message)
            coder.subtract_sent(message, flat)
        assert bool(flat.isfinite().all()), flat
