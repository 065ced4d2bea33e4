"""Exchanges of payloads of which one is wrong: every rank learns whose, and nothing is used."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors import BlockSign, Codec, Compressor, Layout, TopK
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.exchange import AllgatherExchange, Context, Exchange, ShardedServerExchange
from hvd_compress.exchange.topk_tree import mark, sender_of_mark
from tests.unit.receiving import CPU, WRONG, N, loops, wrong

__all__ = ["loops"]  # the fixture


class Peers:
    """Collectives of three ranks, of which this is ``rank``; ``change`` is applied to what they send."""

    def __init__(self, rank: int, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.rank, self.size, self.change = rank, 3, change
        self.told: list[Any] = []

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        self.sent = tensor.clone()
        return Handle(result=torch.cat(self.change([tensor.clone() for _ in range(3)])))

    def alltoall_async(self, tensor: Tensor, splits: Tensor, name: str) -> Handle:
        mine = torch.split(tensor, splits.tolist())[self.rank]
        messages = self.change([mine.clone() for _ in range(3)])
        return Handle(result=(torch.cat(messages), torch.tensor([len(m) for m in messages], dtype=torch.int32)))

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        self.told.append(value)
        return [value] * 3


def exchange_of(make: Callable[[Bucket, Context], Exchange], peers: Any) -> Exchange:
    return make(Bucket("bucket", [ParamEntry(torch.nn.Parameter(torch.zeros(N)), "p", 0)]), Context(peers))


def indices_of(codec: Codec, payload: Tensor) -> Tensor:
    assert isinstance(codec, TopKCodec)
    return codec.unpack(payload)[1]


def last_changed(codec: Codec, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    def apply(messages: list[Tensor]) -> list[Tensor]:
        change(indices_of(codec, messages[-1][: codec.numel]))
        return messages

    return apply


@wrong
def test_allgather(kind: str) -> None:
    peers = Peers(1, list)
    codec = TopK(0.1).codec(Layout(("p",), (N,)), torch.float32, CPU)
    assert isinstance(codec, Codec)
    exchange = exchange_of(lambda bucket, context: AllgatherExchange(bucket, codec, context), peers)
    for change in (WRONG[kind][0], lambda indices: None):
        peers.change = last_changed(codec, change)
        exchange.encode(torch.randn(N))
        exchange.launch()
        if change is WRONG[kind][0]:
            with pytest.raises(RuntimeError, match=rf"payload of bucket: from rank 2: .*{WRONG[kind][1]}.*by rank 1"):
                exchange.wait()
    exchange.wait()
    exchange.add_aggregate(torch.zeros(N), 1.0)
    assert not peers.told


@pytest.mark.parametrize("compressor", [TopK(0.1), BlockSign(), BlockSign(7)], ids=str)
@pytest.mark.parametrize("longer", [-8, 8, 1])
def test_allgather_of_another_length(compressor: Compressor, longer: int, loops: bool) -> None:
    codec = compressor.codec(Layout(("p",), (N,)), torch.float32, CPU)
    assert isinstance(codec, Codec)
    peers = Peers(1, lambda m: [*m[:2], m[2][:longer] if longer < 0 else torch.cat((m[2], m[2][:longer]))])
    exchange = exchange_of(lambda bucket, context: AllgatherExchange(bucket, codec, context), peers)
    exchange.encode(torch.randn(N))
    exchange.launch()
    with pytest.raises(RuntimeError, match=r"corrupted payload of bucket: .* elements where .* are expected"):
        exchange.wait()
    assert peers.told == [(codec.numel, "")]


def server(peers: Any, up: Compressor, down: Compressor) -> ShardedServerExchange:
    found = exchange_of(lambda bucket, context: ShardedServerExchange(bucket, up, down, context), peers)
    assert isinstance(found, ShardedServerExchange)
    return found


@wrong
def test_messages_to_a_server(kind: str, loops: bool) -> None:
    """Only the server sees them: it answers with a wrong length, and says why when all ask."""
    peers = Peers(1, list)
    exchange = server(peers, TopK(0.1), BlockSign())
    codec = exchange._up.codecs[1]
    k = indices_of(codec, torch.zeros(codec.numel, dtype=torch.uint8)).numel()
    assert k == 1
    wanted = {"negative": -1, "as long as the vector": N, "huge": 2**31 - 1, "smallest": -(2**31)}
    if kind not in wanted:
        pytest.skip("one index has no order")
    before = exchange.error.clone()
    peers.change = last_changed(codec, lambda indices: indices.fill_(wanted[kind]))
    exchange.encode(torch.randn(N))
    exchange.launch()
    exchange.next_round()
    assert len(peers.sent) == exchange._answers.lengths[1] + 1
    peers.change = list
    with pytest.raises(RuntimeError, match=rf"to rank 1 from rank 2: TopK: index {wanted[kind]} in slot 0"):
        exchange.wait()
    assert torch.equal(exchange.error, before)


@pytest.mark.parametrize("longer", [-8, 8])
def test_messages_to_a_server_of_another_length(longer: int, loops: bool) -> None:
    peers = Peers(0, lambda m: [m[0], m[1][:longer] if longer < 0 else torch.cat((m[1], m[1][:longer])), m[2]])
    exchange = server(peers, BlockSign(), BlockSign())
    exchange.encode(torch.randn(N))
    exchange.launch()
    exchange.next_round()
    with pytest.raises(RuntimeError, match=r"from rank 1 to rank 0: \d+ bytes where \d+ are expected"):
        exchange.wait()


def test_answers_of_servers() -> None:
    peers = Peers(0, list)
    exchange = server(peers, BlockSign(), TopK(0.1))
    codec = exchange._down.codecs[2]
    exchange.encode(torch.randn(N))
    exchange.launch()

    def change(messages: list[Tensor]) -> list[Tensor]:
        answers = [torch.zeros(length, dtype=torch.uint8) for length in exchange._answers.lengths]
        indices_of(codec, answers[2][: codec.numel]).fill_(99)
        return answers

    peers.change = change
    exchange.next_round()
    with pytest.raises(RuntimeError, match="from rank 2: TopK: index 99"):
        exchange.wait()


def test_marks_in_a_tree() -> None:
    codec = TopK(0.1).codec(Layout(("a",), (N,)), torch.float32, CPU)
    for sender in (0, 1, 1000):
        message = torch.from_numpy(mark(codec, sender))
        assert sender_of_mark(codec, message) == sender
        assert codec.flaw(message) is not None
        message[0] = 0
        assert sender_of_mark(codec, message) is None
    payload = torch.zeros(codec.numel, dtype=torch.uint8)
    codec.encode(torch.randn(N), payload)
    for change, _ in WRONG.values():
        changed = payload.clone()
        change(indices_of(codec, changed))
        assert sender_of_mark(codec, changed) is None
