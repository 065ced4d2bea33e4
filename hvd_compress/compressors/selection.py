"""Common ground of the compressors that send chosen coordinates: how many, and a codec that sends them as views."""

from __future__ import annotations

import abc
import math
from typing import Any, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import SummableCodec
from hvd_compress.compressors.layout import Layout, pieces


def sent_count(numel: int, density: float) -> int:
    """Return how many of ``numel`` elements are sent: ``max(1, floor(numel * density))``, but 0 of an empty tensor."""
    return max(1, math.floor(numel * density)) if numel else 0


def check_density_and_seed(compressor: Any) -> None:
    """Validate the fields ``density`` and ``seed`` of a compressor and store them as float and int.

    Ranks compare the reprs of their compressors, so 1 and 1.0 must not differ.

    Raises:
        ValueError: if one of them is out of range.
    """
    owner = type(compressor).__name__
    validation.density(owner, compressor.density)
    validation.integer(owner, "seed", compressor.seed, 0)
    object.__setattr__(compressor, "density", float(compressor.density))
    object.__setattr__(compressor, "seed", int(compressor.seed))


class SelectionCodec(SummableCodec):
    """A codec that sends views of the tensors, one after the other.

    A subclass selects the views, which must not overlap, in ``select``. No index is sent, so the selection may
    depend on the step that ``set_step`` was called with and on the layout, but not on the data. If the views of a
    step have fewer than ``numel`` elements, the rest of the payload is zeros.

    Args:
        layout: tensors of the bucket.
        numel: largest number of elements that the views of a step may have.
        dtype: dtype of the flat vector and the payload.
    """

    is_sparsifier = True
    data_independent = True

    def __init__(self, layout: Layout, numel: int, dtype: torch.dtype) -> None:
        self.layout, self.numel, self.dtype = layout, numel, dtype

    @abc.abstractmethod
    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return one-dimensional views of the coordinates sent, given the flattened tensors of the layout."""

    def select_flat(self, flat: Tensor) -> list[Tensor]:
        """Return the same views as ``select``, given the flat vector."""
        return self.select(pieces(flat, self.layout.numels))

    def slots(self, payload: Tensor, views: list[Tensor]) -> list[Tensor]:
        """Return the parts of ``payload`` that belong to ``views``."""
        numels = [view.numel() for view in views]
        return list(pieces(payload[: sum(numels)], numels))

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        views = self.select_flat(flat)
        sent = sum(view.numel() for view in views)
        torch.cat(views, out=payload[:sent])
        payload[sent:].zero_()

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        views = self.select_flat(flat)
        torch._foreach_add_(views, self.slots(payload, views), alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self.clear(payload, flat)  # equal for finite values, and a nan that was sent does not remain

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        torch._foreach_zero_(self.select_flat(flat))

    def write(self, payload: Tensor, flat: Tensor) -> None:
        views = self.select_flat(flat)
        torch._foreach_copy_(views, self.slots(payload, views))

    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        views = self.select(tensors)
        torch._foreach_copy_(views, self.slots(payload, views))
