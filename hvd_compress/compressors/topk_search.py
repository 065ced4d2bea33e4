"""Search for the largest elements of a vector: exact, or by a threshold taken from a sample.

Magnitudes are compared as integers: without the sign bit, the bits of floats are ordered as their absolute values
are, and nan is above inf.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_compress.compressors.counter_rng import draw

_I64 = npt.NDArray[np.int64]
_Ints = npt.NDArray[Any]  # as wide as the vector's dtype
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TILE = 2**15  # elements; their magnitudes stay in the cache
_STRIDE, _SAMPLE = 97, 4096  # largest distance of sampled elements; least number of them


def stride(numel: int) -> int:
    """Return the distance of sampled elements, so that at least 1 % and at least 4096 elements (or all) are sampled.

    It is odd, since the rows of a matrix are often of even length and would be sampled at the same columns.
    """
    return (max(1, min(_STRIDE, numel // _SAMPLE)) - 1) | 1


def scan_start(step: int, numel: int) -> int:
    """Return the index where the scan for elements above a sampled threshold begins.

    It is uniform in [0, numel) and depends on the step alone.
    """
    return int(draw(np.zeros(1, dtype=np.uint64), step)[0] % np.uint64(max(1, numel)))


def bits_of(flat: Tensor) -> tuple[Tensor, int]:
    """Return ``flat`` viewed as integers, and the mask that removes their sign bit."""
    dtype = _INTEGER[flat.element_size()]
    return flat.view(dtype), torch.iinfo(dtype).max


def sample_rank(numel: int, k: int) -> int:
    """Return the rank (1 is the largest) of the sampled magnitude that about ``k`` of all elements reach."""
    return max(1, round(-(-numel // stride(numel)) * k / numel))


def sampled_on_device(flat: Tensor, k: int, start: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Find the same elements as ``HostSearch.sampled``, with a result of fixed size: the host need not wait for it.

    Args:
        flat: vector on any device.
        k: largest number of elements to find.
        start: index where the scan begins.
        slots: 1, 2, ..., k on the device of ``flat``.

    Returns:
        int64 indices and values, ``k`` of each; unused ones are 0.
    """
    bits, mask = bits_of(flat)
    magnitudes = bits.bitwise_and(mask)
    n = flat.numel()
    threshold = torch.topk(magnitudes[:: stride(n)], sample_rank(n, k)).values[-1:].clamp_(min=1)
    passed = torch.cumsum(magnitudes >= threshold, 0, dtype=torch.int32)
    total = passed[-1:]
    wanted = slots + passed[start - 1 : start] if start else slots
    wanted = torch.where(wanted > total, wanted - total, wanted)  # the scan continues at the beginning
    used = slots <= total
    # The m-th element that passed is at the first index where the count of passed elements reaches m.
    indices = torch.where(used, torch.searchsorted(passed, wanted), 0)
    return indices, torch.where(used, flat.index_select(0, indices), 0)


class HostSearch:
    """Search in vectors of ``numel`` elements in the host's memory; scratch memory is reused."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._above = np.empty(numel, dtype=bool)
        self._tile: Optional[_Ints] = None

    def largest(self, flat: Tensor, k: int) -> _I64:
        """Return the ascending indices of the ``k`` largest magnitudes; of equal ones the first are taken."""
        n = self._numel
        if k >= n:
            return np.arange(n)
        bits, mask = self._bits(flat)
        sample = bits[:: stride(n)] & mask
        expected = len(sample) * k / n
        for excess in (1.2, 5.0):
            # The rank is high enough that fewer than k elements pass only if the vector is not like its sample.
            rank = int(excess * expected + 4 * math.sqrt(expected) + 4)
            threshold = self._order(sample, rank) if rank < len(sample) else mask * 0
            count = self._mark(bits, mask, threshold)
            if count >= k:
                break
        else:
            threshold, count = mask * 0, self._mark(bits, mask, mask * 0)
        if count > 2 * k and threshold < mask:
            # Many elements may equal the threshold (zeros, for example); then only the first of them are needed.
            more = self._mark(bits, mask, threshold + mask.dtype.type(1))
            if more < k:
                ties = self._equal(bits, mask, threshold, k - more)
                return np.sort(np.concatenate((np.flatnonzero(self._above), ties)))
        indices = np.flatnonzero(self._above)
        magnitudes = bits[indices] & mask
        last = self._order(magnitudes, k)
        chosen = magnitudes > last
        chosen[np.flatnonzero(magnitudes == last)[: k - np.count_nonzero(chosen)]] = True
        largest: _I64 = indices[chosen]
        return largest

    def sampled(self, flat: Tensor, k: int, start: int) -> _I64:
        """Return the indices of the first ``k`` non-zero elements that reach a sampled threshold; there may be fewer.

        The scan begins at ``start`` and continues at the beginning of the vector.
        """
        bits, mask = self._bits(flat)
        threshold = self._order(bits[:: stride(self._numel)] & mask, sample_rank(self._numel, k))
        self._mark(bits, mask, max(threshold, mask.dtype.type(1)))
        indices = np.flatnonzero(self._above)
        first = int(np.searchsorted(indices, start))
        return np.concatenate((indices[first : first + k], indices[:first]))[:k]

    @staticmethod
    def _order(magnitudes: _Ints, rank: int) -> Any:
        """Return the ``rank``-th largest."""
        at = len(magnitudes) - rank
        return np.partition(magnitudes, at)[at]

    @staticmethod
    def _bits(flat: Tensor) -> tuple[_Ints, Any]:
        bits, mask = bits_of(flat)
        array = bits.numpy()
        return array, array.dtype.type(mask)

    def _mark(self, bits: _Ints, mask: Any, threshold: Any) -> int:
        """Mark the elements whose magnitude is at least ``threshold``, and return their number."""
        if self._tile is None or self._tile.dtype != bits.dtype:
            self._tile = np.empty(min(TILE, self._numel), dtype=bits.dtype)
        for low in range(0, self._numel, TILE):
            part = bits[low : low + TILE]
            magnitudes = np.bitwise_and(part, mask, out=self._tile[: len(part)])
            np.greater_equal(magnitudes, threshold, out=self._above[low : low + len(part)])
        return int(np.count_nonzero(self._above))

    def _equal(self, bits: _Ints, mask: Any, magnitude: Any, count: int) -> _I64:
        """Return the first ``count`` indices of elements with exactly this magnitude."""
        parts, low = [], 0
        while count > 0 and low < self._numel:
            part = np.flatnonzero((bits[low : low + TILE] & mask) == magnitude)[:count]
            parts.append(part + low)
            count -= len(part)
            low += TILE
        return np.concatenate(parts)
