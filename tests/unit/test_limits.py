"""Horovod counts in 32 bits: buckets are cut before that matters, and what cannot be cut is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    Cast,
    CountSketch,
    DistEF,
    GlobalSketch,
    GlobalTopK,
    Identity,
    RandomBlock,
    TopK,
    Warmup,
)
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.engine.bucketing import cut_buckets
from hvd_compress.exchange import require_countable

WARM = Warmup(TopK(1 / 1000), (1.0, 0.25))
GATHERED: list[Any] = [DEF(TopK(0.01)), DEF(BlockSign()), DEF(BlockSign(16)), EF(TopK(0.5)), DEF(WARM), EF(WARM)]
OTHERS: list[Any] = [
    DEF(Identity()),
    DEF(RandomBlock()),
    DEF(Cast()),
    DistEF(),
    DistEF(Identity(), BlockSign()),
    LIEC(Identity()),
    GlobalTopK(1.0),
]


def buckets_of(algorithm: Any, ranks: int, dtype: torch.dtype) -> list[Bucket]:
    """A hundred parameters of 2^26 elements, without their memory."""
    parameters = [Parameter(torch.empty(2**26, dtype=dtype, device="meta")) for _ in range(100)]
    entries = [ParamEntry(p, f"p{i}", 0) for i, p in enumerate(parameters)]
    max_bytes = min(algorithm.bucket_bytes, algorithm.bucket_limit(ranks))
    return cut_buckets(entries, prefix="", split_groups=False, max_bytes=max_bytes)


def payload(algorithm: Any, elements: int) -> float:
    """The most bytes of a bucket that travel, of float32 vectors."""
    if algorithm.compressor in (WARM,):
        return max(payload(type(algorithm)(WARM.at(step)), elements) for step in (100, 200))
    if isinstance(algorithm.compressor, TopK):
        return 8.0 * algorithm.compressor.density * elements
    return 4.0 * algorithm.compressor.payload_ratio * elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 64])
@pytest.mark.parametrize("algorithm", GATHERED, ids=str)
def test_what_is_gathered_can_be_counted(algorithm: Any, ranks: int, dtype: torch.dtype) -> None:
    buckets = buckets_of(algorithm, ranks, dtype)
    assert sum(len(b.entries) for b in buckets) == 100
    for bucket in buckets:
        fits = payload(algorithm, bucket.layout.total) * ranks < 2**31
        assert fits or len(bucket.entries) == 1, "a single parameter cannot be cut"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", OTHERS, ids=str)
def test_what_is_summed_or_served_in_shards_is_cut_alike_at_any_number_of_ranks(
    algorithm: Any, dtype: torch.dtype
) -> None:
    few, many = (buckets_of(algorithm, ranks, dtype) for ranks in (2, 1024))
    assert [b.layout.names for b in few] == [b.layout.names for b in many]
    assert all(bucket.layout.total < 2**31 for bucket in few)


def test_sketches_are_cut_by_how_they_travel() -> None:
    sketch = CountSketch(density=1 / 64)
    summed, gathered = GlobalSketch(sketch), GlobalSketch(sketch, "allgather")
    assert summed.bucket_limit(64) == summed.bucket_limit(2)
    assert gathered.bucket_limit(64) < gathered.bucket_limit(2)
    fixed = GlobalSketch(CountSketch(columns=10_000), "allgather")
    assert fixed.bucket_limit(64) == fixed.bucket_limit(2) > gathered.bucket_limit(64), "its table does not grow"


def test_each_stage_of_a_warm_up_is_cut_by_how_it_travels() -> None:
    dense_first = DEF(Warmup(TopK(1 / 1000), (1.0,)))
    assert dense_first.bucket_limit(2) == dense_first.bucket_limit(8), "the dense stage is summed"
    assert EF(Warmup(TopK(1 / 1000))).bucket_bytes == EF(TopK(1 / 1000)).bucket_bytes


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    bucket = Bucket("bucket0.0", [ParamEntry(Parameter(torch.zeros(4)), "embedding.weight", 0)])
    require_countable(bucket, "payloads", 2**31 - 1)
    with pytest.raises(ValueError, match=r"'embedding\.weight'.* 2147483648 .*smaller density"):
        require_countable(bucket, "payloads", 2**31)
