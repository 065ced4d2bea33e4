"""The layout of a bucket's flat vector: which tensor lies where."""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Names and sizes of the tensors of a bucket, which lie in its flat vector one after the other, without gaps.

    Attributes:
        names: the parameters' names. Random draws depend on them.
        numels: numbers of elements, in the same order.
        shapes: dimensions, outermost in memory first (row-major over the tensor's piece of the flat vector);
            () if no tensor has more than one dimension.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        """Return the length of the flat vector."""
        return sum(self.numels)

    def dimensions(self) -> tuple[tuple[int, ...], ...]:
        """Return ``shapes``, or one-dimensional ones if none are given."""
        return self.shapes or tuple((numel,) for numel in self.numels)

    def cut(self, start: int, stop: int) -> Layout:
        """Return the layout of the elements from ``start`` to ``stop`` of the flat vector.

        A tensor that is cut becomes a one-dimensional tensor with a name of its own, so that random draws for its
        parts are independent.
        """
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


def pieces(flat: Tensor, numels: Sequence[int]) -> tuple[Tensor, ...]:
    """Return consecutive one-dimensional views of ``flat`` with the given lengths."""
    return torch.split_with_sizes(flat, list(numels))
