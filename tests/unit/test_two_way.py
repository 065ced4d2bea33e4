"""The server spread over ranks: where shards begin and end, and what owners hold when the number of ranks changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from hvd_compress import BlockSign
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.exchange import Context, Reduction, ShardedServerExchange
from hvd_compress.exchange.sharded_server import SHARD, borders_of
from hvd_compress.telemetry import Recorder

SHAPES = ((7, 5), (), (0, 3), (4, 6))
TOTAL = 35 + 1 + 24


class Seat:
    """A rank's place in a job whose size changes."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = size, rank


def owner(size: int, rank: int) -> ShardedServerExchange:
    """The exchange of one rank, as an owner that holds back 1, 2, 3, ... at the elements of its shard."""
    entries = [ParamEntry(Parameter(torch.zeros(shape)), f"p{i}", 0) for i, shape in enumerate(SHAPES)]
    seat: Any = Seat(size, rank)
    context = Context(seat, Reduction(), Recorder())
    exchange = ShardedServerExchange(Bucket("bucket", entries), BlockSign(), BlockSign(), context)
    begin, end = exchange.span
    exchange.error.copy_(torch.arange(1.0, TOTAL + 1)[begin:end])
    return exchange


@given(total=st.integers(0, 10_000), ranks=st.integers(1, 300))
def test_shards_cover_everything_once_and_none_is_much_longer(total: int, ranks: int) -> None:
    borders = borders_of(total, ranks)
    lengths = [b - a for a, b in zip(borders, borders[1:])]
    assert (borders[0], borders[-1], len(lengths)) == (0, total, ranks)
    assert all(border % SHARD == 0 for border in borders[:-1] if border < total)
    assert min(lengths) >= 0
    assert max(lengths) - min(lengths) <= 2 * SHARD


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_owners_hold_counts_once(size: int) -> None:
    owed = torch.stack([owner(size, rank).owed() for rank in range(size)]).mean(0)
    assert torch.allclose(owed, torch.arange(1.0, TOTAL + 1))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("settled", [True, False], ids=["at a step", "before the next step"])
def test_what_survivors_hold_counts_once_when_ranks_come_or_go(before: int, after: int, settled: bool) -> None:
    """Elastic: those that leave take what they held; who joins holds nothing yet; a flush may come before any step."""
    staying = [owner(before, rank) for rank in range(min(before, after))]
    kept = torch.stack([e.owed() for e in staying]).sum(0) / before
    for exchange in staying:
        exchange.context.comm.size = after  # type: ignore[misc]
    owed = [exchange.resettle() if settled else exchange.owed() for exchange in staying]
    assert torch.allclose(torch.stack([o for o in owed if o is not None]).sum(0) / after, kept)
    if settled:
        assert not any(bool(exchange.error.any()) for exchange in staying), "handed over, not doubled"
        assert [exchange.borders for exchange in staying] == [borders_of(TOTAL, after)] * len(staying)
        assert all(exchange.resettle() is None for exchange in staying)
    else:
        spans = [exchange.span for exchange in staying]
        assert spans == [tuple(borders_of(TOTAL, before)[r : r + 2]) for r in range(len(staying))]
