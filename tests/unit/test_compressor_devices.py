"""Count-sketch and low rank on a simulated accelerator, see accelerator.py."""

from __future__ import annotations

import pytest
import torch

from hvd_compress.compressors import Compressor, CountSketch, Layout, LowRank
from tests.unit.accelerator import DEVICE, Accelerator, accelerator

__all__ = ["accelerator"]  # the fixture

SHAPES = ((7, 5), (), (0, 3), (1,), (4, 3, 2, 2))
LAYOUT = Layout(("a", "b", "empty", "c", "d"), (35, 1, 0, 1, 48), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("columns", [1, 9, 30, None])
def test_count_sketch(accelerator: Accelerator, columns: int, rows: int, dtype: torch.dtype) -> None:
    codec = CountSketch(rows=rows, columns=columns, density=1).codec(LAYOUT, dtype, DEVICE)
    flat = torch.zeros(LAYOUT.total, dtype=dtype, device=DEVICE)
    payload = torch.zeros(codec.numel, dtype=codec.dtype, device=DEVICE)
    for step in range(3):
        codec.set_step(step)
        codec.encode(flat, payload)
        codec.estimate(payload, flat)
        codec.accumulate(payload, flat, -0.5)
        found = codec.heavy_hitters(payload, 7)
        assert (found.device, found.dtype, found.shape) == (DEVICE, torch.int64, (7,))


def test_a_count_sketch_is_few_operations(accelerator: Accelerator) -> None:
    """The number of operations must not grow with the blocks: launching kernels would take longer than the work."""
    n = 10_000_000
    codec = CountSketch(density=1 / 1000).codec(Layout(("a",), (n,)), torch.float32, DEVICE)
    flat, payload = torch.zeros(n, device=DEVICE), torch.zeros(codec.numel, device=DEVICE)
    codec.set_step(0)
    before = accelerator.operations
    codec.encode(flat, payload)
    codec.estimate(payload, flat)
    assert accelerator.operations - before < 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_low_rank(accelerator: Accelerator, rank: int, dtype: torch.dtype) -> None:
    codec = LowRank(rank).codec(LAYOUT, dtype, DEVICE)
    flat = torch.zeros(LAYOUT.total, dtype=dtype, device=DEVICE)
    for step in range(3):
        codec.set_step(step)
        for index, numel in enumerate(codec.numels):
            payload = torch.zeros(numel, dtype=codec.dtype, device=DEVICE)
            codec.encode(index, flat, payload)
            codec.receive(index, payload)
        codec.accumulate(flat, -0.5)
        assert {t.device for t in codec.warm_start()["warm"]} == {DEVICE}
    codec.reset()


@pytest.mark.parametrize("compressor", [CountSketch(density=0.3), LowRank(1), LowRank(9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_one_by_one(accelerator: Accelerator, compressor: Compressor, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        decoded = compressor.decode(compressor.encode(torch.zeros(shape, dtype=dtype, device=DEVICE), "w", 1))
        assert (decoded.shape, decoded.dtype, decoded.device) == (shape, dtype, DEVICE)
