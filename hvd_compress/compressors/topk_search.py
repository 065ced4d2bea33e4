"""Which elements of a vector are largest: exactly, or by a threshold taken from a sample.

Magnitudes are compared as integers: without its sign bit a float's bits order as its absolute value does, and
nan lies above inf.
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
TILE = 2**15  # elements whose magnitudes stay in the cache
_STRIDE, _SAMPLE = 97, 4096


def stride(numel: int) -> int:
    """Distance of sampled elements: at least 1 % and at least 4096 of them, or all. Odd, as rows often are even."""
    return (max(1, min(_STRIDE, numel // _SAMPLE)) - 1) | 1


def scan_start(step: int, numel: int) -> int:
    """Where the scan for elements above a sampled threshold begins: uniform in [0, numel), by step alone."""
    return int(draw(np.zeros(1, dtype=np.uint64), step)[0] % np.uint64(max(1, numel)))


def bits_of(flat: Tensor) -> tuple[Tensor, int]:
    """``flat`` as integers, and the mask that takes the sign from them."""
    dtype = _INTEGER[flat.element_size()]
    return flat.view(dtype), torch.iinfo(dtype).max


def sample_rank(numel: int, k: int) -> int:
    """The place among the sampled magnitudes, largest first, above which about ``k`` of all elements lie."""
    return max(1, round(-(-numel // stride(numel)) * k / numel))


def sampled_on_device(flat: Tensor, k: int, start: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What ``HostSearch.sampled`` finds, without a result whose size the host would have to wait for.

    Args:
        slots: 1, 2, ..., k on the device of ``flat``.

    Returns:
        int64 places and values, ``k`` of each; unused ones are 0.
    """
    bits, mask = bits_of(flat)
    magnitudes = bits.bitwise_and(mask)
    n = flat.numel()
    threshold = torch.topk(magnitudes[:: stride(n)], sample_rank(n, k)).values[-1:].clamp_(min=1)
    passed = torch.cumsum(magnitudes >= threshold, 0, dtype=torch.int32)
    total = passed[-1:]
    wanted = slots + passed[start - 1 : start] if start else slots
    wanted = torch.where(wanted > total, wanted - total, wanted)  # round the end
    used = slots <= total
    # The first place where the count reaches a number is where the element with this number lies.
    places = torch.where(used, torch.searchsorted(passed, wanted), 0)
    return places, torch.where(used, flat.index_select(0, places), 0)


class HostSearch:
    """Searches in vectors of ``numel`` elements in the host's memory; keeps its scratch memory."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._above = np.empty(numel, dtype=bool)
        self._tile: Optional[_Ints] = None

    def largest(self, flat: Tensor, k: int) -> _I64:
        """Ascending places of the ``k`` largest magnitudes; of equal ones the first are taken."""
        n = self._numel
        if k >= n:
            return np.arange(n)
        bits, mask = self._bits(flat)
        sample = bits[:: stride(n)] & mask
        expected = len(sample) * k / n
        for excess in (1.2, 5.0):
            # Enough of the sample that fewer than k pass only where the vector is not like its sample.
            rank = int(excess * expected + 4 * math.sqrt(expected) + 4)
            threshold = self._order(sample, rank) if rank < len(sample) else mask * 0
            count = self._mark(bits, mask, threshold)
            if count >= k:
                break
        else:
            threshold, count = mask * 0, self._mark(bits, mask, mask * 0)
        if count > 2 * k and threshold < mask:
            # Many elements may equal the threshold (zeros, say): then no more is needed than the first of them.
            more = self._mark(bits, mask, threshold + mask.dtype.type(1))
            if more < k:
                ties = self._equal(bits, mask, threshold, k - more)
                return np.sort(np.concatenate((np.flatnonzero(self._above), ties)))
        places = np.flatnonzero(self._above)
        magnitudes = bits[places] & mask
        last = self._order(magnitudes, k)
        chosen = magnitudes > last
        chosen[np.flatnonzero(magnitudes == last)[: k - np.count_nonzero(chosen)]] = True
        largest: _I64 = places[chosen]
        return largest

    def sampled(self, flat: Tensor, k: int, start: int) -> _I64:
        """At most ``k`` places of non-zero elements above a sampled threshold, in ascending order from ``start``
        and round the end."""
        bits, mask = self._bits(flat)
        threshold = self._order(bits[:: stride(self._numel)] & mask, sample_rank(self._numel, k))
        self._mark(bits, mask, max(threshold, mask.dtype.type(1)))
        places = np.flatnonzero(self._above)
        first = int(np.searchsorted(places, start))
        return np.concatenate((places[first : first + k], places[:first]))[:k]

    @staticmethod
    def _order(magnitudes: _Ints, rank: int) -> Any:
        """The ``rank``-th largest."""
        at = len(magnitudes) - rank
        return np.partition(magnitudes, at)[at]

    @staticmethod
    def _bits(flat: Tensor) -> tuple[_Ints, Any]:
        bits, mask = bits_of(flat)
        array = bits.numpy()
        return array, array.dtype.type(mask)

    def _mark(self, bits: _Ints, mask: Any, threshold: Any) -> int:
        """Mark the elements of at least this magnitude, and count them."""
        if self._tile is None or self._tile.dtype != bits.dtype:
            self._tile = np.empty(min(TILE, self._numel), dtype=bits.dtype)
        for low in range(0, self._numel, TILE):
            part = bits[low : low + TILE]
            magnitudes = np.bitwise_and(part, mask, out=self._tile[: len(part)])
            np.greater_equal(magnitudes, threshold, out=self._above[low : low + len(part)])
        return int(np.count_nonzero(self._above))

    def _equal(self, bits: _Ints, mask: Any, magnitude: Any, count: int) -> _I64:
        """The first ``count`` places of exactly this magnitude."""
        parts, low = [], 0
        while count > 0 and low < self._numel:
            part = np.flatnonzero((bits[low : low + TILE] & mask) == magnitude)[:count]
            parts.append(part + low)
            count -= len(part)
            low += TILE
        return np.concatenate(parts)
