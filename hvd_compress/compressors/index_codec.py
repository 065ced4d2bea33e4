"""A codec of chosen coordinates, for all tensors of a bucket at once, by one index into its flat vector."""

from __future__ import annotations

import abc
from typing import Any, Optional, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_compress.compressors.base import SummableCodec
from hvd_compress.compressors.layout import Layout, pieces

# Elements per tensor, on average, below which tensors are written by way of a copy of all: a call for each costs more.
SMALL = 2**12


def upload(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``, without waiting for it."""
    return torch.from_numpy(values).to(device, non_blocking=True)


class IndexCodec(SummableCodec):
    """Sends the coordinates that a subclass draws for a step, from data that all ranks know.

    Args:
        layout: tensors of the bucket.
        counts: number of coordinates sent of each tensor.
        dtype: dtype of the flat vector and the payload.
        device: where they are.
    """

    is_sparsifier = True
    data_independent = True

    def __init__(self, layout: Layout, counts: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.dtype = layout, dtype
        self._counts, self._device = list(counts), device
        self.numel = sum(self._counts)
        self._index = torch.zeros(self.numel, dtype=torch.int64, device=device)
        numels = np.array(layout.numels, dtype=np.int64)
        # Of each coordinate, where its tensor begins; not needed where tensors are written all at once.
        self._begins: Optional[Tensor] = None
        if layout.total >= SMALL * len(numels):
            self._begins = upload(np.repeat(np.cumsum(numels) - numels, self._counts), device)

    @abc.abstractmethod
    def draw(self, step: int) -> npt.NDArray[Any]:
        """Return the coordinates of ``step`` in the flat vector, int64, tensor after tensor, none of them twice."""

    def set_step(self, step: int) -> None:
        self._index = upload(self.draw(step), self._device)

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        torch.index_select(flat, 0, self._index, out=payload)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        flat.index_add_(0, self._index, payload, alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self.clear(payload, flat)  # equal for finite values, and a nan that was sent does not remain

    def write(self, payload: Tensor, flat: Tensor) -> None:
        flat.index_copy_(0, self._index, payload)

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        flat.index_fill_(0, self._index, 0.0)

    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        if self._begins is None:
            together = torch.cat(list(tensors))
            together.index_copy_(0, self._index, payload.to(together.dtype))
            torch._foreach_copy_(list(tensors), list(pieces(together, self.layout.numels)))
            return
        indices = pieces(self._index - self._begins, self._counts)
        for tensor, index, values in zip(tensors, indices, pieces(payload, self._counts)):
            tensor.index_copy_(0, index, values.to(tensor.dtype))
