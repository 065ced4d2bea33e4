"""What ranks tell each other about themselves: plain values as text, and nothing that is executed when it is read."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress.comm.communicator import Communicator
from hvd_compress.comm.plain_values import decode, encode, message_of

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
)
KEYS = SCALARS | st.tuples(SCALARS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=8
)


class Place:
    """A process set of this rank alone, or of several ranks whose messages a test makes up."""

    process_set_id, ranks = None, None

    def __init__(self, size: int = 1) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def receiving(messages: list[bytes], lengths: Any = None, monkeypatch: Any = None) -> Communicator:
    """Return a communicator that gets these messages, and says that they have these lengths."""
    comm = Communicator(Place(len(messages)))
    found = [len(message) for message in messages] if lengths is None else lengths

    def allgather(tensor: torch.Tensor, name: str) -> torch.Tensor:
        if name.endswith(".length"):
            return torch.tensor(found)
        return torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.uint8)

    monkeypatch.setattr(comm, "allgather", allgather)
    return comm


@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    again = decode(encode(value))
    assert again == value
    assert repr(again) == repr(value), "types too"


def test_numbers_of_other_libraries_become_pythons() -> None:
    again = decode(encode((np.int32(3), np.float32(0.5), Fraction(1, 4), torch.Size([2, 3]))))
    assert again == (3, 0.5, 0.25, (2, 3))
    assert [type(item) for item in again] == [int, float, float, tuple]
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(2), [1, (2, {"a": print})], 1j])
def test_what_cannot_be_sent_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"object|set|Tensor|builtin_function|complex"):
        encode(value)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error(data: bytes) -> None:
    try:
        value = decode(data)
    except ValueError:
        return
    assert repr(decode(encode(value))) == repr(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1",
        b"\xff",
        b'{"set":[1]}',
        b'{"tuple":1}',
        b'{"tuple":[],"bytes":""}',
        b"{}",
        b'{"bytes":"0g"}',
        b'{"bytes":7}',
        b'{"dict":[[1]]}',
        b'{"dict":[[[1],2]]}',
        b"[" * 100_000,
        pickle.dumps([("what", 1)]),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_malformed_text_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whatever json says
        decode(data)


def test_values_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [[("a", (1, None))], [], "x"]
    assert receiving([message_of(v) for v in values], None, monkeypatch).gather_objects(1, "name") == values
    assert Communicator(Place()).gather_objects({"a": b"\0"}, "name") == [{"a": b"\0"}]


@pytest.mark.parametrize("data", [b"", b"!", b"=[1", b"?1", pickle.dumps(1)], ids=repr)
def test_the_sender_of_malformed_data_is_named(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = receiving([b"=1", data, b"=1"], None, monkeypatch)
    error = TypeError if data[:1] == b"!" else RuntimeError
    with pytest.raises(error, match="rank 1" if data else r"lengths \[2, 0, 2\]"):
        comm.gather_objects(1, "name")


@pytest.mark.parametrize("lengths", [[2, 2], [2, -2, 2], [2, 3, 2], [2, 2**62, 2], [2, 2, 2, 0]], ids=str)
def test_lengths_are_checked(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="corrupted lengths"):
        receiving([b"=1"] * 3, lengths, monkeypatch).gather_objects(1, "name")


def test_a_value_that_cannot_be_sent_is_everybodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that has it must not end alone: the others would wait for it."""
    comm = receiving([b"=1", message_of(object())], None, monkeypatch)
    with pytest.raises(TypeError, match=r"rank 1 .* object"):
        comm.gather_objects(1, "name")
