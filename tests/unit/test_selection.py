"""Codecs that send views: against plain indexing, with payloads that the views of a step may not fill."""

from __future__ import annotations

import math
from typing import Any, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import CountSketch, Layout, RandomBlock, RandomK, SelectionCodec

layouts = st.lists(st.integers(0, 30), min_size=1, max_size=6).map(
    lambda numels: Layout(tuple(f"p{i}" for i in range(len(numels))), tuple(numels))
)
dtypes = st.sampled_from([torch.float32, torch.float64])


class EveryOther(SelectionCodec):
    """Codec of two views per tensor, in reverse order: from the middle on, and the second of every three before it."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__(layout, layout.total, dtype)
        self._shift = 0

    def set_step(self, step: int) -> None:
        self._shift = step

    def middle(self, numel: int) -> int:
        return min(numel, numel // 2 + self._shift)

    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        views: list[Tensor] = []
        for tensor in tensors:
            middle = self.middle(tensor.numel())
            views += tensor[middle:], tensor[:middle][1::3]
        return views

    def indices(self) -> list[int]:
        """Return the indices of the payload's values in the flat vector, from the definition."""
        found, begin = [], 0
        for numel in self.layout.numels:
            middle = self.middle(numel)
            found += [*range(begin + middle, begin + numel), *range(begin + 1, begin + middle, 3)]
            begin += numel
        return found


def normal(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(layouts, dtypes, st.integers(0, 5))
def test_a_codec_follows_from_its_views(layout: Layout, dtype: torch.dtype, step: int) -> None:
    codec, flat, target = EveryOther(layout, dtype), normal(layout.total, dtype, 0), normal(layout.total, dtype, 1)
    codec.set_step(step)
    index = torch.tensor(codec.indices(), dtype=torch.int64)
    payload, before = torch.full((codec.numel,), math.nan, dtype=dtype), flat.clone()
    codec.encode(flat, payload)
    assert torch.equal(flat, before), "encode must not touch its input"
    assert torch.equal(payload[: len(index)], flat[index])
    assert not payload[len(index) :].any(), "the rest is zeros"

    written = target.clone()
    codec.write(payload, written)
    assert torch.equal(written, target.index_copy(0, index, flat[index]))
    tensors = [part.clone() for part in torch.split(target, list(layout.numels))]
    codec.write_tensors(payload, tensors)
    assert torch.equal(torch.cat(tensors), written)
    added = target.clone()
    codec.accumulate(payload, added, -1.5)
    torch.testing.assert_close(added, target.index_add(0, index, flat[index], alpha=-1.5))
    cleared, residual = target.clone(), flat.clone()
    codec.clear(payload, cleared)
    assert torch.equal(cleared, target.index_fill(0, index, 0.0))
    residual[index] = math.nan
    codec.subtract_sent(payload, residual)
    assert torch.equal(residual, flat.index_fill(0, index, 0.0)), "also a nan that was sent does not remain"


@given(layouts, st.integers(0, 9))
def test_tensors_of_another_dtype_are_written(layout: Layout, step: int) -> None:
    codec = EveryOther(layout, torch.float32)
    codec.set_step(step)
    payload, flat = torch.empty(codec.numel), normal(layout.total, torch.float32, 0)
    codec.encode(flat, payload)
    tensors = [torch.zeros(numel, dtype=torch.bfloat16) for numel in layout.numels]
    codec.write_tensors(payload, tensors)
    written = torch.zeros(layout.total)
    codec.write(payload, written)
    assert torch.equal(torch.cat(tensors), written.bfloat16())


@pytest.mark.parametrize("kind", [RandomBlock, RandomK, CountSketch])
def test_density_and_seed_are_validated_and_have_one_repr(kind: Any) -> None:
    assert repr(kind(density=1, seed=True + 1)) == repr(kind(density=1.0, seed=2))
    for arguments, said in (({"density": 0.0}, "density"), ({"density": 1.5}, "density"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {said}"):
            kind(**arguments)
