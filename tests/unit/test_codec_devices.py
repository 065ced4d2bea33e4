"""Codecs of gathered and of randomly drawn payloads on a simulated accelerator, see accelerator.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_compress.compressors import BlockSign, Codec, Compressor, Layout, RandomK, SummableCodec, TopK
from tests.unit.accelerator import DEVICE, HostWaits, Uploading, uploading

__all__ = ["uploading"]  # the fixture

COMPRESSORS: list[Compressor] = [
    TopK(density=0.1),
    TopK(density=1),
    TopK(density=0.1, sampled=True),
    BlockSign(),
    BlockSign(block_size=7),
    RandomK(density=0.3),
    RandomK(density=1),
]
LAYOUT = Layout(("a", "empty", "b", "c"), (40, 0, 1, 9))
WIDE = [torch.float32, torch.float64]
compressors = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)


def memory(codec: Codec) -> Tensor:
    return torch.zeros(codec.numel, dtype=codec.dtype, device=DEVICE)


def test_only_uploads_are_let_pass(uploading: Uploading) -> None:
    v = torch.zeros(9, device=DEVICE)
    assert torch.zeros(9).to(DEVICE, non_blocking=True).device == DEVICE
    with pytest.raises(HostWaits, match="moves"):
        torch.zeros(9).to(DEVICE)
    with pytest.raises(HostWaits):
        v.add_(torch.zeros(9))
    with pytest.raises((HostWaits, RuntimeError)):
        v.nonzero()


@compressors
@pytest.mark.parametrize("dtype", WIDE)
def test_codecs(uploading: Uploading, compressor: Compressor, dtype: torch.dtype) -> None:
    codec, flat = compressor.codec(LAYOUT, dtype, DEVICE), torch.zeros(50, dtype=dtype, device=DEVICE)
    assert isinstance(codec, Codec)
    payload = memory(codec)
    for step in range(6):
        codec.set_step(step)
        codec.encode(flat, payload)
        codec.accumulate(payload, flat, -0.5)
        codec.subtract_sent(payload, flat)
        if compressor.is_sparsifier:
            codec.clear(payload, flat)
        if isinstance(codec, SummableCodec):
            codec.write(payload, flat)
            codec.write_tensors(payload, torch.split(flat, list(LAYOUT.numels)))


@compressors
@pytest.mark.parametrize("dtype", WIDE)
def test_shards(uploading: Uploading, compressor: Compressor, dtype: torch.dtype) -> None:
    shards = compressor.sharded(LAYOUT, [0, 16, 40, 50], dtype, DEVICE)
    flat, payloads = torch.zeros(50, dtype=dtype, device=DEVICE), [memory(codec) for codec in shards.codecs]
    for step in range(3):
        shards.set_step(step)
        shards.encode(flat, payloads)
        for j, codec in enumerate(shards.codecs):
            codec.accumulate(payloads[j], shards.shard(flat, j), 1.0)


@compressors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *WIDE])
def test_tensors_one_by_one(uploading: Uploading, compressor: Compressor, dtype: torch.dtype) -> None:
    for shape in ((7, 5), (), (0, 3), (1,)):
        for step in range(4):
            decoded = compressor.decode(compressor.encode(torch.zeros(shape, dtype=dtype, device=DEVICE), "w", step))
            assert (decoded.shape, decoded.dtype, decoded.device) == (shape, dtype, DEVICE)


@compressors
@pytest.mark.parametrize("numels", [(), (0,), (1,)], ids=str)
def test_buckets_of_next_to_nothing(compressor: Compressor, numels: tuple[int, ...]) -> None:
    """Real values are checked on the host."""
    layout = Layout(tuple("abc"[: len(numels)]), numels)
    codec, flat = compressor.codec(layout, torch.float32, torch.device("cpu")), torch.full((layout.total,), -2.0)
    assert isinstance(codec, Codec)
    payload = torch.zeros(codec.numel, dtype=codec.dtype)
    codec.set_step(0)
    codec.encode(flat, payload)
    codec.accumulate(payload, flat, -1.0)
    assert flat.tolist() == [0.0] * layout.total
