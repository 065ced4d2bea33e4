"""Payloads from other ranks whose sizes or places are wrong: an error that says what and whose, and nothing is used."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress import native
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors import (
    BlockSign,
    Cast,
    Codec,
    Compressor,
    CountSketch,
    Identity,
    Layout,
    LowRank,
    Payload,
    RandomBlock,
    RandomK,
    TopK,
)
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.compressors.topk_places import misplaced
from hvd_compress.exchange import AllgatherExchange, Context, Exchange, ShardedServerExchange
from hvd_compress.exchange.topk_tree import mark, sender_of_mark
from hvd_compress.native import signs, sketch

N = 50
CPU = torch.device("cpu")
ALL: list[Compressor] = [
    TopK(0.1),
    TopK(0.1, sampled=True),
    BlockSign(),
    BlockSign(7),
    RandomK(0.3),
    RandomBlock(0.3),
    CountSketch(0.5),
    LowRank(1),
    Identity(),
    Cast(),
]
# Changes of a payload's indices, which ascend, and what the error must say.
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "negative": (lambda i: i[:1].fill_(-1), "index -1 in slot 0"),
    "as long as the vector": (lambda i: i[-1:].fill_(N), f"index {N} in slot 4"),
    "huge": (lambda i: i[2:3].fill_(2**31 - 1), "TopK: index "),
    "smallest": (lambda i: i[1:2].fill_(-(2**31)), "TopK: index "),
    "duplicate": (lambda i: i[3:4].copy_(i[2:3]), "in slot 3"),
    "order": (lambda i: i.copy_(i.flip(0).clone()), "TopK: index "),
}
wrong = pytest.mark.parametrize("kind", WRONG)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the compiled loops and without."""
    if request.param and native._kernels is None:
        pytest.skip("the compiled loops are not built")
    if not request.param:
        for module, name in ((native, "_kernels"), (signs, "_signs"), (sketch, "_sketch")):
            monkeypatch.setattr(module, name, None)
    return bool(request.param)


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


# -- decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("change", ["short", "empty", "one", "long", "matrix", "dtype"])
def test_decode_refuses_payloads_of_another_size(compressor: Compressor, change: str, loops: bool) -> None:
    payload = compressor.encode(torch.randn(10, 5), "w", 3)
    v = payload.values
    odd = {
        "short": v[:-1],
        "empty": v[:0],
        "one": v[:1],
        "long": torch.cat((v, v[:8])),
        "matrix": v.view(1, -1),
        "dtype": v.to(torch.int16),
    }[change]
    with pytest.raises(ValueError, match=f"{type(compressor).__name__}: a payload of shape"):
        compressor.decode(Payload(odd, payload.shape, payload.dtype, payload.context))
    assert compressor.decode(payload).shape == (10, 5)


@wrong
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sampled", [False, True])
def test_decode_refuses_places(kind: str, dtype: torch.dtype, sampled: bool) -> None:
    compressor = TopK(0.1, sampled)
    # A sampled payload begins anywhere; at step 0 the scan passes the end of the vector once.
    v = torch.zeros(N, dtype=dtype)
    v[::10] = torch.tensor([1.0, 2, 3, 4, 5], dtype=dtype)
    payload = compressor.encode(v)
    change, text = WRONG[kind]
    indices = payload.values[5 * dtype.itemsize :].clone().view(torch.int32)
    change(indices)
    payload.values[5 * dtype.itemsize :] = indices.view(torch.uint8)
    with pytest.raises(ValueError, match="TopK: index" if sampled else text):
        compressor.decode(payload)


def test_decode_refuses_another_block() -> None:
    payload = RandomBlock(0.3).encode(torch.randn(N), "w", 3)
    for context in ({"start": -1}, {"start": N}, {"length": 16}, {"start": 2**40}):
        with pytest.raises(ValueError, match=r"RandomBlock: start=.* and length=.* are not allowed"):
            RandomBlock(0.3).decode(
                Payload(payload.values, payload.shape, payload.dtype, {**payload.context, **context})
            )


# -- places ----------------------------------------------------------------------------------------------


@given(
    places=st.lists(st.integers(-2, 12) | st.sampled_from([2**31 - 1, -(2**31)]), min_size=1, max_size=6),
    zeros=st.integers(0, 63),
    sampled=st.booleans(),
)
def test_an_accelerator_refuses_what_the_host_refuses_and_no_place_is_used_twice(
    places: list[int], zeros: int, sampled: bool
) -> None:
    n, k = 10, len(places)
    values = torch.tensor([0.0 if zeros >> j & 1 else 1.0 + j for j in range(k)])
    codec = TopK(k / n, sampled).codec(Layout(("a",), (n,)), torch.float32, CPU)
    payload = torch.zeros(codec.numel, dtype=torch.uint8)
    codec.unpack(payload)[0].copy_(values)
    codec.unpack(payload)[1].copy_(torch.tensor(places, dtype=torch.int32))
    found = codec.flaw(payload)
    rows = torch.stack((payload, payload))
    flawed = codec.disarm(rows)
    assert flawed is not None
    assert flawed.tolist() == [found is not None] * 2
    assert torch.equal(rows[0], payload if found is None else torch.zeros_like(payload))
    used = [place for place, value in zip(places, values) if value]
    sound = all(0 <= place < n for place in places) and len(set(used)) == len(used)
    assert found is not None or sound
    codec.accumulate(rows[0], torch.zeros(n), 1.0)


@given(data=st.data(), sampled=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_payload_that_is_made_is_sound(data: st.DataObject, sampled: bool, dtype: torch.dtype) -> None:
    n = data.draw(st.integers(1, 300))
    v = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0, np.nan, np.inf]), min_size=n, max_size=n))
    )
    codec = TopK(data.draw(st.floats(0.01, 1.0)), sampled).codec(Layout(("a",), (n,)), dtype, CPU)
    payload = torch.full((codec.numel,), 255, dtype=torch.uint8)
    codec.set_step(data.draw(st.integers(0, 1000)))
    codec.encode(v.to(dtype), payload)
    assert codec.flaw(payload) is None
    flawed = codec.disarm(payload.unsqueeze(0))
    assert flawed is not None
    assert not flawed.any()
    values, places = codec.unpack(payload)
    assert not misplaced(values.unsqueeze(0), places.unsqueeze(0), n, 1 + sampled).any()


# -- exchanges -------------------------------------------------------------------------------------------


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


# -- compiled loops --------------------------------------------------------------------------------------


def test_compiled_loops_refuse_offsets_and_ends(loops: bool) -> None:
    if not loops:
        pytest.skip("only of the compiled loops")
    flat, table = torch.ones(10), torch.zeros(1, 4)
    factors = torch.ones(1, 3)
    scratch = torch.zeros(40_000, dtype=torch.int64), torch.zeros(40_000, dtype=torch.int32)
    calls: list[Callable[[Tensor], None]] = [
        lambda offsets: sketch.sketch(flat, table, offsets, factors),
        lambda offsets: sketch.estimate(table, offsets, factors, flat),
        lambda offsets: sketch.largest(table, offsets, factors, 10, 2, *scratch),
    ]
    for bad in (-1, 4, 2**40):
        for call in calls:
            with pytest.raises(ValueError, match=f"offset 1 is {bad}; it must be in"):
                call(torch.tensor([[0, bad, 1]]))
    bits = torch.zeros(2, dtype=torch.uint8)
    for ends in ([4, 4, 10], [4, 3, 10]):
        array = np.array(ends, dtype=np.int64)
        with pytest.raises(ValueError, match="ends of blocks must ascend, and the end of block 1 does not"):
            signs.add(bits, flat, array, np.ones(3, dtype=np.float32))
        with pytest.raises(ValueError, match="ends of blocks"):
            signs.pack(flat, bits, array)
