"""What a compressor is: pure mathematics on tensors, without network, memory or Horovod.

A compressor is seen from two sides. ``encode``/``decode`` act on one tensor and define the mathematics.
``codec`` gives the same map for a whole bucket: a contiguous flat vector holding many tensors, so that a
training step costs a few tensor operations and one collective however many parameters there are.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass, field
from typing import Any, ClassVar, Iterator, NamedTuple, Sequence, Union

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the tensors of a bucket lie in its flat vector: one after the other, without gaps.

    Attributes:
        names: the parameters' names, which seed what is drawn for them.
        numels: their numbers of elements, in the same order.
        shapes: their dimensions, outermost in memory first (row-major over the tensor's piece of the flat
            vector); () if no tensor has more than one.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        """Length of the flat vector."""
        return sum(self.numels)

    def dimensions(self) -> tuple[tuple[int, ...], ...]:
        """``shapes``, or one-dimensional ones where none are given."""
        return self.shapes or tuple((numel,) for numel in self.numels)

    def cut(self, start: int, stop: int) -> Layout:
        """The part of the flat vector from ``start`` to ``stop``: tensors cut by the borders become shorter
        ones with names of their own, so that what is drawn for the parts is independent, and of one dimension."""
        names, numels, shapes, begin = [], [], [], 0
        for name, numel, shape in zip(self.names, self.numels, self.dimensions()):
            low, high = max(start, begin), min(stop, begin + numel)
            if low < high:
                whole = high - low == numel
                names.append(name if whole else f"{name}@{low - begin}")
                numels.append(high - low)
                shapes.append(shape if whole else (high - low,))
            begin += numel
        return Layout(tuple(names), tuple(numels), tuple(shapes) if self.shapes else ())


@dataclass(frozen=True)
class Payload:
    """What travels for one tensor.

    Attributes:
        values: the data sent, one-dimensional.
        shape: shape of the tensor it stands for.
        dtype: dtype of the tensor it stands for.
        context: what the receiver knows anyway (drawn from seed, name and step) and is not sent.
    """

    values: Tensor
    shape: torch.Size
    dtype: torch.dtype
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.values.numel() * self.values.element_size()


class Codec(abc.ABC):
    """A compressor bound to one bucket: the same payload size and dtype at every step.

    Attributes:
        numel: elements of the payload ("payload").
        dtype: dtype of the payload; torch.uint8 (a multiple of 8 bytes) where payloads are gathered.
    """

    numel: int
    dtype: torch.dtype

    def set_step(self, step: int) -> None:  # noqa: B027
        """Draw what step ``step`` needs; host work only."""

    @abc.abstractmethod
    def encode(self, flat: Tensor, payload: Tensor) -> None:
        """Write the payload of ``flat`` (``layout.total`` elements) into ``payload`` (``numel`` elements)."""

    @abc.abstractmethod
    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        """``flat += alpha * decode(payload)``."""

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        """``flat -= decode(payload)`` for the payload of this ``flat``."""
        self.accumulate(payload, flat, -1.0)

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        """Set the coordinates that ``payload`` stands for to zero in ``flat`` (compressors that select coordinates)."""
        raise NotImplementedError(f"{type(self).__name__} sends something of every coordinate")


class SummableCodec(Codec):
    """Payloads may be added, and stand for coordinates that all ranks know without being told.

    Attributes:
        data_independent: True if the payload is a choice of coordinates that does not depend on the data, so
            that it can be taken from each term of a sum alone, before the sum itself is formed.
    """

    data_independent: ClassVar[bool] = False

    @abc.abstractmethod
    def write(self, payload: Tensor, flat: Tensor) -> None:
        """Set the coordinates that ``payload`` stands for in ``flat``, and leave the others as they are."""

    @abc.abstractmethod
    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        """``write`` into one-dimensional tensors of their own, one per tensor of the layout."""


class JointCodec(abc.ABC):
    """A payload agreed on in rounds, each made from the mean over ranks of the one before.

    What is decoded in the end is common to all ranks; each rank's residual is taken against it.

    Attributes:
        numels: elements of the payload of each round.
        dtype: dtype of the payloads.
    """

    numels: tuple[int, ...]
    dtype: torch.dtype

    def set_step(self, step: int) -> None:  # noqa: B027
        """Draw what step ``step`` needs; host work only."""

    @abc.abstractmethod
    def encode(self, index: int, flat: Tensor, payload: Tensor) -> None:
        """Write the payload of round ``index`` into ``payload`` (``numels[index]`` elements)."""

    @abc.abstractmethod
    def receive(self, index: int, payload: Tensor) -> None:
        """Take the mean over ranks of the payloads of round ``index``."""

    @abc.abstractmethod
    def accumulate(self, flat: Tensor, alpha: float) -> None:
        """``flat += alpha * decode(all rounds)``."""

    def warm_start(self) -> dict[str, list[Tensor]]:
        """What makes the next step better and is the same on every rank, by kind: one tensor per parameter."""
        return {}


AnyCodec = Union[Codec, JointCodec]


class ShardedCodec:
    """The payload of a bucket as one message per shard, so that each shard has an owner that decodes it.

    By default each shard is compressed by itself. Compressors whose statistics span a tensor (the scale of
    its signs, say) override ``encode`` to take them before the tensor is cut.

    Attributes:
        codecs: for each shard the codec that decodes its message.
        borders: where the shards begin and end in the flat vector, ``len(codecs) + 1`` ascending numbers.
    """

    def __init__(self, codecs: Sequence[Codec], borders: Sequence[int]) -> None:
        self.codecs, self.borders = list(codecs), list(borders)

    def set_step(self, step: int) -> None:
        """Draw what step ``step`` needs; host work only."""
        for codec in self.codecs:
            codec.set_step(step)

    def shard(self, flat: Tensor, index: int) -> Tensor:
        """View of shard ``index`` of a flat vector."""
        return flat[self.borders[index] : self.borders[index + 1]]

    def encode(self, flat: Tensor, payloads: Sequence[Tensor]) -> None:
        """Write the message of each shard of ``flat`` into ``payloads[j]`` (``codecs[j].numel`` elements)."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.encode(shard, payload)

    def subtract_sent(self, payloads: Sequence[Tensor], flat: Tensor) -> None:
        """``flat -= decode(payloads)`` for the messages of the last ``encode``."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.subtract_sent(payload, shard)

    def accumulate(self, payloads: Sequence[Tensor], flat: Tensor, alpha: float) -> None:
        """``flat += alpha * decode(payloads)``, one message for each shard."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.accumulate(payload, shard, alpha)

    def _messages(self, payloads: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Codec, Tensor, Tensor]]:
        """Codec, message and part of ``flat`` of each shard; more ranks than elements leave shards empty."""
        for index, (codec, payload) in enumerate(zip(self.codecs, payloads)):
            if payload.numel():
                yield codec, payload, self.shard(flat, index)


class Combine(enum.Enum):
    """How the payloads of several ranks become one aggregate."""

    SUM = "sum"  # they may be added: ring-allreduce; codec() gives a SummableCodec
    GATHER = "gather"  # each is decoded on its own: allgather; codec() gives a Codec of bytes
    JOINT = "joint"  # made together in rounds; codec() gives a JointCodec
    SKETCH = "sketch"  # they may be added, but decoding keeps too little for error feedback to converge


class Compressor(abc.ABC):
    """Base of all compressors: frozen dataclasses, validated when built.

    Attributes:
        combine: how payloads of several ranks become one aggregate.
        lossless: True if ``decode(encode(v))`` equals ``v`` up to the dtype of the payload, so that it may
            be used without error feedback.
        selects: True if the payload is a choice of coordinates with their values.
    """

    combine: Combine = Combine.SUM
    lossless: ClassVar[bool] = False
    is_sparsifier: ClassVar[bool] = False

    @property
    def summable(self) -> bool:
        """Whether payloads of several ranks may be added."""
        return self.combine in (Combine.SUM, Combine.SKETCH)

    @property
    def payload_ratio(self) -> float:
        """About how much of a tensor's bytes its payload has."""
        return 1.0

    @abc.abstractmethod
    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Compress one tensor of any shape; ``name`` and ``step`` seed what is drawn."""

    @abc.abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """The tensor that ``payload`` stands for, in its original shape and dtype."""

    @abc.abstractmethod
    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> AnyCodec:
        """Bind to a bucket whose flat vector has ``dtype`` (float32 or float64) and lives on ``device``."""

    def sharded(self, layout: Layout, borders: Sequence[int], dtype: torch.dtype, device: torch.device) -> ShardedCodec:
        """As ``codec``, with a message of its own for each shard between ``borders`` (multiples of 8, or the end)."""
        codecs = [self.codec(layout.cut(a, b), dtype, device) for a, b in zip(borders, borders[1:])]
        if not all(isinstance(codec, Codec) for codec in codecs):
            raise ValueError(f"{self!r} cannot be cut into shards: its payload is made by all ranks together")
        return ShardedCodec([codec for codec in codecs if isinstance(codec, Codec)], borders)


def pieces(flat: Tensor, numels: Sequence[int]) -> tuple[Tensor, ...]:
    """Consecutive one-dimensional views of ``flat`` with the given lengths."""
    return torch.split_with_sizes(flat, list(numels))
