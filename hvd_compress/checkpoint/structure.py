"""Nested states of dicts, lists, numbers and tensors as JSON text and named tensors, and back, without pickle.

In JSON, None, booleans, strings, ints of 64 bits and finite floats stand for themselves, and an array for a list.
Everything else is an object with one key, which says what it is: ``{"dict": [[key, value], ...]}``,
``{"tuple": [...]}``, ``{"int": "0x..."}``, ``{"float": 16 hexadecimal digits}`` for infinities and nans,
``{"tensor": [name, strides or null]}``.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any, Callable, Collection, Mapping, NamedTuple

import torch
from torch import Tensor

SEQUENCES: dict[str, type] = {"tuple": tuple, "size": torch.Size}
# Schedulers count their milestones in a Counter.
MAPPINGS: dict[str, type] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_TAGS = {kind: tag for tag, kind in (*SEQUENCES.items(), *MAPPINGS.items())}


class FlatState(NamedTuple):
    """A nested state in two parts.

    Attributes:
        text: JSON of everything but the tensors' content.
        tensors: the tensors (not copied, on their devices, of any strides) by name.
    """

    text: str
    tensors: dict[str, Tensor]


def flatten(state: Any, dtypes: Collection[torch.dtype]) -> FlatState:
    """Return ``state`` in two parts.

    Args:
        state: dicts (also OrderedDict, Counter), lists, tuples, torch.Size, str, int, float, bool, None, dense tensors.
        dtypes: the dtypes that tensors may have.

    Raises:
        TypeError: if there is anything else in it; the message has its path, such as ``extra/sampler/0``.
    """
    flattener = _Flattener(dtypes)
    try:
        text = json.dumps(flattener.encode(state, ""), separators=(",", ":"))
    except RecursionError as error:
        raise TypeError("the state cannot be saved: it is nested too deeply, or contains itself") from error
    return FlatState(text, flattener.tensors)


def unflatten(text: str, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that ``flatten`` has divided; tensors are on the host, new, with the strides that they had.

    Two entries that were one tensor are one tensor again.

    Raises:
        ValueError: if ``text`` is not what ``flatten`` writes, or a tensor is missing.
    """
    placed: dict[str, Tensor] = {}

    def tensor(name: str, strides: Any) -> Tensor:
        if name not in placed:
            found = tensors[name]
            strides = _contiguous(found.shape) if strides is None else strides
            placed[name] = torch.empty_strided(found.shape, strides, dtype=found.dtype, device="cpu").copy_(found)
        return placed[name]

    try:
        return _decode(json.loads(text), tensor)
    except (AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError, struct.error) as error:
        raise ValueError(f"its description of the state cannot be read: {error!r}") from error


class _Flattener:
    """A state being divided; each tensor gets the path to it as its name."""

    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._dtypes = dtypes
        self._names: dict[Any, str] = {}

    def encode(self, value: Any, path: str) -> Any:
        """Return ``value`` as JSON can hold it."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return self._encode_tensor(value, path)
        if kind is list:
            return self._encode_items(value, path)
        if kind in SEQUENCES.values():
            return {_TAGS[kind]: self._encode_items(value, path)}
        if kind in MAPPINGS.values():
            return {
                _TAGS[kind]: [
                    [self.encode(key, _join(path, "a key")), self.encode(item, _join(path, key))]
                    for key, item in value.items()
                ]
            }
        raise TypeError(
            f"{path or 'the state'} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; "
            "convert it to a tensor, or to dicts, lists, tuples, str, int, float, bool and None"
        )

    def _encode_items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(value, _join(path, index)) for index, value in enumerate(values)]

    def _encode_tensor(self, tensor: Tensor, path: str) -> Any:
        self._require_plain(tensor, path)
        kind = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        same = (tensor.device, tensor.data_ptr(), *kind) if tensor.numel() else id(tensor)
        name = self._names.get(same)
        if name is None:
            name = self._names[same] = self._unused_name(path)
            self.tensors[name] = tensor.detach()
        usual = _contiguous(tensor.shape)
        if tensor.stride() == usual:
            return {"tensor": [name, None]}
        # The strides that a copy has: convolutions choose their algorithm, and so their rounding, by them.
        strides = torch.empty_like(tensor.detach(), device="meta").stride()
        return {"tensor": [name, None if strides == usual else list(strides)]}

    def _require_plain(self, tensor: Tensor, path: str) -> None:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.device.type != "meta" and tensor.dtype in self._dtypes:
            return
        raise TypeError(
            f"{path or 'the state'} is a {type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            ", which a checkpoint cannot hold; convert it to dense tensors of another dtype"
        )

    def _unused_name(self, path: str) -> str:
        """Return ``path``, or one like it, as a name that safetensors can hold and no tensor has."""
        name = path.encode("utf-8", "backslashreplace").decode("utf-8")
        return f"{name}#{len(self.tensors)}" if name in self.tensors or name == "__metadata__" else name


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a new tensor."""
    strides, count = [], 1
    for extent in reversed(shape):
        strides.append(count)
        count *= max(extent, 1)
    return tuple(reversed(strides))


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _decode(node: Any, tensor: Callable[[str, Any], Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    ((tag, content),) = node.items()
    if tag == "tensor":
        return tensor(*content)
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if tag in SEQUENCES:
        return SEQUENCES[tag](_decode(item, tensor) for item in content)
    pairs = [(_decode(key, tensor), _decode(item, tensor)) for key, item in content]
    found = MAPPINGS[tag]()
    for key, item in pairs:
        found[key] = item
    return found
