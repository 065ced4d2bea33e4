"""The server spread over ranks: borders of shards, and servers' errors when the number of ranks changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from hvd_compress import BlockSign
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.exchange import Context, ShardedServerExchange
from hvd_compress.exchange.sharded_server import SHARD, shard_borders

SHAPES = ((7, 5), (), (0, 3), (4, 6))
TOTAL = 35 + 1 + 24


class Place:
    """A rank's place in a job whose size changes."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank


def server(size: int, rank: int) -> ShardedServerExchange:
    """Return the exchange of one rank, as a server whose error is 1, 2, 3, ... at the elements of its shard."""
    entries = [ParamEntry(Parameter(torch.zeros(shape)), f"p{i}", 0) for i, shape in enumerate(SHAPES)]
    place: Any = Place(size, rank)
    exchange = ShardedServerExchange(Bucket("bucket", entries), BlockSign(), BlockSign(), Context(place))
    begin, end = exchange.span
    exchange.error.copy_(torch.arange(1.0, TOTAL + 1)[begin:end])
    return exchange


@given(total=st.integers(0, 10_000), ranks=st.integers(1, 300))
def test_shards_cover_everything_once_and_none_is_much_longer(total: int, ranks: int) -> None:
    borders = shard_borders(total, ranks)
    lengths = [b - a for a, b in zip(borders, borders[1:])]
    assert (borders[0], borders[-1], len(lengths)) == (0, total, ranks)
    assert all(border % SHARD == 0 for border in borders[:-1] if border < total)
    assert min(lengths) >= 0
    assert max(lengths) - min(lengths) <= 2 * SHARD


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_servers_errors_count_once(size: int) -> None:
    pending = torch.stack([server(size, rank).server_pending() for rank in range(size)]).mean(0)
    assert torch.allclose(pending, torch.arange(1.0, TOTAL + 1))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("resharded", [True, False], ids=["at a step", "before the next step"])
def test_survivors_errors_count_once_when_ranks_come_or_go(before: int, after: int, resharded: bool) -> None:
    """Elastic: ranks that leave take their errors along, new ranks have none; a flush may come before any step."""
    staying = [server(before, rank) for rank in range(min(before, after))]
    kept = torch.stack([e.server_pending() for e in staying]).sum(0) / before
    for exchange in staying:
        exchange.context.comm.size = after  # type: ignore[misc]
    pending = [exchange.reshard() if resharded else exchange.server_pending() for exchange in staying]
    assert torch.allclose(torch.stack([p for p in pending if p is not None]).sum(0) / after, kept)
    if resharded:
        assert not any(bool(exchange.error.any()) for exchange in staying), "moved, not doubled"
        assert [exchange.borders for exchange in staying] == [shard_borders(TOTAL, after)] * len(staying)
        assert all(exchange.reshard() is None for exchange in staying)
    else:
        spans = [exchange.span for exchange in staying]
        assert spans == [tuple(shard_borders(TOTAL, before)[r : r + 2]) for r in range(len(staying))]
