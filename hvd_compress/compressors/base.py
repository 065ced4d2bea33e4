"""What a compressor is: pure mathematics on tensors, without network, memory or Horovod.

A compressor is seen from two sides. ``encode``/``decode`` act on one tensor and define the mathematics.
``codec`` gives the same map for a whole bucket: a contiguous flat vector holding many tensors, so that a
training step costs a few tensor operations and one collective however many parameters there are.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Sequence

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the tensors of a bucket lie in its flat vector: one after the other, without gaps.

    Attributes:
        names: the parameters' names, which seed what is drawn for them.
        numels: their numbers of elements, in the same order.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]

    @property
    def total(self) -> int:
        """Length of the flat vector."""
        return sum(self.numels)


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
        numel: elements of the payload ("wire").
        dtype: dtype of the payload.
        restricts: True if the payload is a choice of coordinates that does not depend on the data, so
            that it can be taken from each term of a sum alone, before the sum itself is formed.
    """

    numel: int
    dtype: torch.dtype
    restricts: ClassVar[bool] = False

    def begin(self, step: int) -> None:  # noqa: B027
        """Draw what step ``step`` needs; host work only."""

    @abc.abstractmethod
    def encode(self, flat: Tensor, wire: Tensor) -> None:
        """Write the payload of ``flat`` (``layout.total`` elements) into ``wire`` (``numel`` elements)."""

    @abc.abstractmethod
    def accumulate(self, wire: Tensor, flat: Tensor, alpha: float) -> None:
        """``flat += alpha * decode(wire)``."""

    @abc.abstractmethod
    def write(self, wire: Tensor, flat: Tensor) -> None:
        """Set the coordinates that ``wire`` stands for in ``flat``, and leave the others as they are."""


    @abc.abstractmethod
    def scatter(self, wire: Tensor, tensors: Sequence[Tensor]) -> None:
        """``write`` into one-dimensional tensors of their own, one per tensor of the layout."""


class Compressor(abc.ABC):
    """Base of all compressors: frozen dataclasses, validated when built.

    Attributes:
        summable: True if payloads of several ranks may be added (ring-allreduce); False if each must be
            decoded on its own (allgather).
        lossless: True if ``decode(encode(v))`` equals ``v`` up to the dtype of the payload, so that it may
            be used without error feedback.
    """

    summable: ClassVar[bool] = True
    lossless: ClassVar[bool] = False

    @property
    def fraction(self) -> float:
        """About how much of a tensor's bytes its payload has."""
        return 1.0

    @abc.abstractmethod
    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Compress one tensor of any shape; ``name`` and ``step`` seed what is drawn."""

    @abc.abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """The tensor that ``payload`` stands for, in its original shape and dtype."""

    @abc.abstractmethod
    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> Codec:
        """Bind to a bucket whose flat vector has ``dtype`` (float32 or float64) and lives on ``device``."""


def pieces(flat: Tensor, numels: Sequence[int]) -> tuple[Tensor, ...]:
    """Consecutive one-dimensional views of ``flat`` with the given lengths."""
    return torch.split_with_sizes(flat, list(numels))
