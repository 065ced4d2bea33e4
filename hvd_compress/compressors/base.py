"""Interface of compressors: pure mathematics on tensors, without network, optimizer state or Horovod.

A compressor is a description. Its ``codec`` does the work for a bucket, a contiguous flat vector that holds many
tensors, so that a training step takes a few tensor operations and one collective however many parameters there are.
``encode`` and ``decode`` apply the same map to a single tensor.
"""

from __future__ import annotations

import abc
import enum
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Iterator, Optional, Sequence, Union

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.layout import Layout


@dataclass(frozen=True)
class Payload:
    """The message for one tensor.

    Attributes:
        values: the data sent, one-dimensional.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        context: values that the receiver knows without being told, such as name and step.
    """

    values: Tensor
    shape: torch.Size
    dtype: torch.dtype
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes sent."""
        return self.values.numel() * self.values.element_size()


class Combine(enum.Enum):
    """Ways to combine the payloads of several ranks into one aggregate."""

    SUM = "sum"  # added by an allreduce: SummableCodec
    GATHER = "gather"  # gathered, and decoded one by one: any other Codec
    JOINT = "joint"  # made by all ranks together in rounds: JointCodec
    SKETCH = "sketch"  # may be added, but decoding keeps too little for error feedback to converge


class Codec(abc.ABC):
    """A compressor bound to one bucket; its payload has the same size and dtype at every step.

    Attributes:
        combine: how payloads of several ranks become one aggregate.
        is_sparsifier: True if the payload is a choice of coordinates with their values.
        numel: elements of the payload.
        dtype: dtype of the payload; torch.uint8, and ``numel`` a multiple of 8, if payloads are gathered.
    """

    combine: ClassVar[Combine] = Combine.GATHER
    is_sparsifier: ClassVar[bool] = False
    numel: int
    dtype: torch.dtype

    def set_step(self, step: int) -> None:  # noqa: B027
        """Make the random draws of step ``step``; must be called before ``encode``. Work of the host only."""

    @abc.abstractmethod
    def encode(self, flat: Tensor, payload: Tensor) -> None:
        """Write the payload of ``flat`` (``layout.total`` elements) into ``payload`` (``numel`` elements)."""

    @abc.abstractmethod
    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        """Add ``alpha * decode(payload)`` to ``flat``."""

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        """Subtract ``decode(payload)`` from ``flat``, of which it was encoded.

        Override it where the result is known to be zero: a nan would remain if it were subtracted from itself.
        """
        self.accumulate(payload, flat, -1.0)

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        """Set the coordinates of ``flat`` that ``payload`` has values of to zero; implemented by sparsifiers."""
        raise NotImplementedError(f"{type(self).__name__} sends something of every coordinate")

    def flaw(self, payload: Tensor) -> Optional[str]:
        """Return what is wrong with a payload of ``numel`` elements from another rank, in the host's memory, or None.

        Override it, and ``disarm``, where a payload says which coordinates it has values of: they index memory. Values
        are not judged, whether they are finite or not.
        """
        return None

    def disarm(self, payloads: Tensor) -> Optional[Tensor]:
        """Set payloads (ranks, ``numel``) from other ranks to zero where they are flawed, without waiting for a device.

        Returns:
            bool (ranks), True where a payload was flawed; None if there is nothing to check.
        """
        return None


class SummableCodec(Codec):
    """A codec whose payloads may be added: they hold values of coordinates that all ranks know without being told.

    Attributes:
        data_independent: True if the payload is a choice of coordinates that does not depend on the data, so
            that each term of a sum can be encoded before the sum is formed.
    """

    combine = Combine.SUM
    data_independent: ClassVar[bool] = False

    @abc.abstractmethod
    def write(self, payload: Tensor, flat: Tensor) -> None:
        """Set the coordinates of ``flat`` that ``payload`` has values of, and leave the others unchanged."""

    @abc.abstractmethod
    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        """Do the same as ``write`` for separate one-dimensional tensors of any dtype, one per tensor of the layout."""


class JointCodec(abc.ABC):
    """A codec whose payload is made in rounds, each of them from the mean over ranks of the one before.

    The result is the same on all ranks. It is the mean of what each of them has contributed.

    Attributes:
        numels: elements of the payload of each round.
        dtype: dtype of the payloads.
    """

    combine: ClassVar[Combine] = Combine.JOINT
    is_sparsifier: ClassVar[bool] = False
    numels: tuple[int, ...]
    dtype: torch.dtype

    def set_step(self, step: int) -> None:  # noqa: B027
        """Make the random draws of step ``step``; must be called before ``encode``. Work of the host only."""

    @abc.abstractmethod
    def encode(self, index: int, flat: Tensor, payload: Tensor) -> None:
        """Write the payload of round ``index`` into ``payload`` (``numels[index]`` elements)."""

    @abc.abstractmethod
    def receive(self, index: int, payload: Tensor) -> None:
        """Accept the mean over ranks of the payloads of round ``index``; ``payload`` may be overwritten later."""

    @abc.abstractmethod
    def accumulate(self, flat: Tensor, alpha: float) -> None:
        """Add ``alpha`` times the decoded result of all rounds to ``flat``; the same bits on every rank."""

    @abc.abstractmethod
    def subtract_sent(self, flat: Tensor) -> None:
        """Subtract from ``flat``, of which the payloads were encoded, what this rank has contributed to the result."""

    def commit(self) -> None:  # noqa: B027
        """Remember what improves the next step: the step is taken."""

    def reset(self) -> None:  # noqa: B027
        """Forget what ``commit`` has remembered."""

    def warm_start(self) -> dict[str, list[Tensor]]:
        """Return the state that improves the next step, by kind: one tensor per parameter, the same on every rank."""
        return {}


AnyCodec = Union[Codec, JointCodec]


class ShardedCodec:
    """Codec of a bucket whose payload is one message per shard, each decoded by the owner of the shard.

    By default each shard is compressed by itself. Compressors whose statistics span a tensor (such as the scale of
    its signs) override ``encode`` to compute them before the tensor is cut.

    Attributes:
        codecs: the codec of each shard, which decodes its message.
        borders: begin of each shard in the flat vector, and the end of the last: ``len(codecs) + 1`` ascending numbers.
    """

    def __init__(self, codecs: Sequence[Codec], borders: Sequence[int]) -> None:
        self.codecs, self.borders = list(codecs), list(borders)

    def set_step(self, step: int) -> None:
        """Make the random draws of step ``step``; work of the host only."""
        for codec in self.codecs:
            codec.set_step(step)

    def shard(self, flat: Tensor, index: int) -> Tensor:
        """Return a view of shard ``index`` of a flat vector."""
        return flat[self.borders[index] : self.borders[index + 1]]

    def encode(self, flat: Tensor, payloads: Sequence[Tensor]) -> None:
        """Write the message of each shard of ``flat`` into ``payloads[j]`` (``codecs[j].numel`` elements)."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.encode(shard, payload)

    def subtract_sent(self, payloads: Sequence[Tensor], flat: Tensor) -> None:
        """Subtract the decoded messages of the last ``encode`` from ``flat``, of which they were encoded."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.subtract_sent(payload, shard)

    def accumulate(self, payloads: Sequence[Tensor], flat: Tensor, alpha: float) -> None:
        """Add ``alpha`` times the decoded messages, one per shard, to ``flat``."""
        for codec, payload, shard in self._messages(payloads, flat):
            codec.accumulate(payload, shard, alpha)

    def _messages(self, payloads: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Codec, Tensor, Tensor]]:
        """Yield codec, message and part of ``flat`` of each shard that is not empty."""
        for index, (codec, payload) in enumerate(zip(self.codecs, payloads)):
            if payload.numel():
                yield codec, payload, self.shard(flat, index)


class Compressor(abc.ABC):
    """Base class of compressors: frozen dataclasses that validate their arguments.

    A subclass implements ``codec``. Everything else follows from the codec, unless it is overridden.
    """

    @property
    def combine(self) -> Combine:
        """Return how payloads of several ranks become one aggregate, by the type of the codec."""
        return self._codec_properties[0]

    @property
    def is_sparsifier(self) -> bool:
        """Return True if the payload is a choice of coordinates with their values, by the type of the codec."""
        return self._codec_properties[1]

    @property
    def payload_ratio(self) -> float:
        """Return the approximate size of a tensor's payload as a fraction of the tensor's bytes."""
        return 1.0

    @abc.abstractmethod
    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> AnyCodec:
        """Bind the compressor to a bucket, which may have no tensors, and whose flat vector lies on ``device``.

        ``dtype`` is that of the flat vector: float32 or float64 in training, and in ``encode`` the tensor's.
        """

    def sharded(self, layout: Layout, borders: Sequence[int], dtype: torch.dtype, device: torch.device) -> ShardedCodec:
        """Bind the compressor to a bucket as ``codec`` does, with a separate message for each shard.

        Args:
            borders: begin of each shard and the end of the last; multiples of 8, or the end of the flat vector.

        Raises:
            ValueError: if the payload is made by all ranks together.
        """
        codecs = [self.codec(layout.cut(a, b), dtype, device) for a, b in zip(borders, borders[1:])]
        if not all(isinstance(codec, Codec) for codec in codecs):
            raise ValueError(f"{self!r} cannot be cut into shards: its payload is made by all ranks together")
        return ShardedCodec([codec for codec in codecs if isinstance(codec, Codec)], borders)

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Compress one tensor of any shape and floating-point dtype, as a bucket that holds nothing else.

        Random draws depend on ``name`` and ``step``. No gradient flows through the payload.
        """
        flat = tensor.detach().reshape(-1).contiguous()
        codec = self._codec_of_one(flat, tensor.shape, name, step)
        values = torch.empty(codec.numel, dtype=codec.dtype, device=flat.device)
        codec.encode(flat, values)
        return Payload(values, tensor.shape, tensor.dtype, {"name": name, "step": step})

    def decode(self, payload: Payload) -> Tensor:
        """Return the tensor that ``payload`` represents, in its original shape and dtype.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape and dtype. (On an accelerator only its size
                is checked here; whether its indices are in range, the device checks.)
        """
        flat = torch.zeros(payload.shape.numel(), dtype=payload.dtype, device=payload.values.device)
        codec = self._codec_of_one(flat, payload.shape, payload.context["name"], payload.context["step"])
        values = payload.values
        validation.payload_size(type(self).__name__, values.shape, values.dtype, codec.numel, codec.dtype)
        if isinstance(codec, SummableCodec):
            codec.write(payload.values, flat)
        else:
            codec.accumulate(payload.values, flat, 1.0)
        return flat.view(payload.shape)

    def _codec_of_one(self, flat: Tensor, shape: torch.Size, name: str, step: int) -> Codec:
        codec = self.codec(Layout((name,), (flat.numel(),), (tuple(shape),)), flat.dtype, flat.device)
        if not isinstance(codec, Codec):
            raise NotImplementedError(f"{type(self).__name__}: a JointCodec needs an encode and a decode of its own")
        codec.set_step(step)
        return codec

    @functools.cached_property
    def _codec_properties(self) -> tuple[Combine, bool]:
        codec = self.codec(Layout((), ()), torch.float32, torch.device("cpu"))
        return codec.combine, codec.is_sparsifier
