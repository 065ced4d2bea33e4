"""gTop-k's merge of two messages: the largest coordinates of their sum, and nothing lost."""

from __future__ import annotations

import math

import torch

from hvd_compress.compressors import Layout, TopK
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.exchange.topk_tree import merge_messages

N, K = 10, 3


def message(codec: TopKCodec, vector: dict[int, float]) -> torch.Tensor:
    flat = torch.zeros(N)
    flat[list(vector)] = torch.tensor(list(vector.values()))
    payload = torch.zeros(codec.numel, dtype=torch.uint8)
    codec.encode(flat, payload)
    return payload


def merge(a: dict[int, float], b: dict[int, float]) -> tuple[dict[int, float], dict[int, float]]:
    """Return what is kept and what is dropped of the sum of two messages, by coordinate."""
    codec = TopK(K / N).codec(Layout(("a",), (N,)), torch.float32, torch.device("cpu"))
    result, places, sums = merge_messages(codec, message(codec, a).numpy(), message(codec, b).numpy())
    values, kept = codec.unpack(torch.from_numpy(result))
    return dict(zip(kept.tolist(), values.tolist())), dict(zip(places.tolist(), sums.tolist()))


def test_the_largest_of_the_sum_are_kept_and_the_rest_is_dropped() -> None:
    kept, dropped = merge({0: 1.0, 4: -5.0, 7: 2.0}, {1: -3.0, 4: 4.5, 9: 2.5})
    assert kept == {1: -3.0, 7: 2.0, 9: 2.5}
    assert dropped == {0: 1.0, 4: -0.5}


def test_what_cancels_gives_way_to_the_rest() -> None:
    kept, dropped = merge({0: 1.0, 4: -5.0, 7: 2.0}, {0: 1.0, 4: 5.0, 7: 2.0})
    assert kept == {0: 2.0, 4: 0.0, 7: 4.0}
    assert dropped == {}


def test_nan_counts_as_larger_than_anything() -> None:
    """A nan is never dropped, as with TopK, so that it is seen."""
    kept, dropped = merge({0: 1.0, 4: math.nan, 7: 2.0}, {1: -3.0, 5: 1e30, 9: 2.5})
    assert sorted(kept) == [1, 4, 5]
    assert math.isnan(kept[4])
    assert dropped == {0: 1.0, 7: 2.0, 9: 2.5}
