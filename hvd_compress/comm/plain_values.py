"""Plain values as bytes, for what ranks tell each other about themselves.

Pickled bytes may call anything when they are read, so none are. This is JSON, in which an object is a tag: what JSON
lacks travels as ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}`` and ``{"bytes": "hexadecimal digits"}``.
"""

from __future__ import annotations

import json
from numbers import Integral, Real
from typing import Any, Callable


def encode(value: Any) -> bytes:
    """Return ``value`` as ASCII text.

    Args:
        value: None, a string, a number, bytes, or a list, a tuple or a dict of such values. Numbers of other libraries
            become Python's.

    Raises:
        TypeError: if it is, or has in it, anything else; the message has its type and text.
    """
    return json.dumps(_tagged(value), separators=(",", ":")).encode("ascii")


def decode(data: bytes) -> Any:
    """Return the value of which ``encode`` has made ``data``.

    Raises:
        ValueError: if the bytes are not such a text.
    """
    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=_untagged)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _tagged(value: Any) -> Any:
    """Return ``value`` in terms of JSON."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_tagged(key), _tagged(item)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks: {value!r:.200}")


def _bytes(content: Any) -> bytes:
    if not isinstance(content, str):
        raise ValueError(f"bytes are given as {content!r:.80} instead of hexadecimal digits")
    return bytes.fromhex(content)


def _tuple(content: Any) -> tuple[Any, ...]:
    if not isinstance(content, list):
        raise ValueError(f"a tuple is given as {content!r:.80} instead of a list")
    return tuple(content)


def _dict(content: Any) -> dict[Any, Any]:
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise ValueError(f"a dict is given as {content!r:.80} instead of a list of pairs")
    try:
        return dict(content)
    except TypeError as error:
        raise ValueError(f"a key of a dict is not allowed: {error}") from error


_TAGS: dict[str, Callable[[Any], Any]] = {"bytes": _bytes, "tuple": _tuple, "dict": _dict}


def _untagged(pairs: list[tuple[str, Any]]) -> Any:
    """Return the value that a tagged object stands for; its content has been decoded."""
    if len(pairs) != 1 or pairs[0][0] not in _TAGS:
        raise ValueError(f"an object is tagged {[key for key, _ in pairs]!r:.80} instead of one of {sorted(_TAGS)}")
    tag, content = pairs[0]
    return _TAGS[tag](content)


# The first byte of a message says what follows: a value, or why there is none.
_VALUE, _REFUSED = b"=", b"!"


def message_of(value: Any) -> bytes:
    """Return what a rank sends for ``value``: also a value that cannot be sent must reach all ranks, as an error."""
    try:
        return _VALUE + encode(value)
    except TypeError as error:
        return _REFUSED + str(error).encode("utf-8", "replace")


def value_of(message: bytes, sender: int, reader: str) -> Any:
    """Return the value that rank ``sender`` has sent as ``message_of`` it.

    Args:
        reader: who reads it, for messages.

    Raises:
        TypeError: if the sender had a value that cannot be sent.
        RuntimeError: if the message is malformed.
    """
    if message[:1] == _REFUSED:
        text = message[1:].decode("utf-8", "replace")
        raise TypeError(f"{reader}: rank {sender} has a value that cannot be sent: {text}")
    try:
        if message[:1] != _VALUE:
            raise ValueError(f"it begins with {message[:1]!r}")
        return decode(message[1:])
    except ValueError as error:
        raise RuntimeError(f"{reader}: corrupted data from rank {sender}: {error}") from error
