"""Random-k sparsifier: k coordinates of each tensor, drawn without replacement and known to every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hvd_compress.compressors.base import Compressor, SummableCodec
from hvd_compress.compressors.counter_rng import U64, draw, mix, tensor_key
from hvd_compress.compressors.index_codec import IndexCodec
from hvd_compress.compressors.layout import Layout
from hvd_compress.compressors.selection import check_density_and_seed, sent_count

_I64 = npt.NDArray[np.int64]
ROUNDS = 6  # with 4, pairs of coordinates in small tensors are visibly not uniform
CHUNK = 2**15  # coordinates drawn at once, so that intermediate results stay in the cache
_HALF = np.uint64(32)


@dataclass(frozen=True)
class RandomK(Compressor):
    """Sparsifier that sends k random coordinates of each tensor, which all ranks agree on.

    Of n elements ``k = max(1, floor(n * density))`` distinct ones are sent, unscaled: each with probability
    ``k / n``, so that ``E ||v - C(v)||_2^2 = (1 - k/n) ||v||_2^2`` (Stich et al. 2018, "Sparsified SGD with
    memory"). The coordinates are a pure function of (seed, tensor name, step), so no index is sent and payloads
    can be summed by a ring-allreduce.

    The coordinates are the first k values of a keyed permutation of [0, n): a Feistel network of 6 rounds on
    Z_a x Z_b, where a = ceil(sqrt(n)) and b = ceil(n / a), that is run again from values >= n (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains"), and then rotated by a uniform distance.

    Args:
        density: fraction of elements sent, 0 < density <= 1.
        seed: seed of the draw; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    density: float = 1 / 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_density_and_seed(self)

    @property
    def payload_ratio(self) -> float:
        return self.density

    def selection(self, name: str, numel: int, step: int) -> _I64:
        """Return the ascending int64 coordinates sent of tensor ``name`` with ``numel`` elements at ``step``."""
        return _Coordinates(self, Layout((name,), (numel,))).draw(step)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return _RandomKCodec(self, layout, dtype, device)


class _Coordinates:
    """The random draw for all tensors of a layout at once, in numpy.

    Attributes:
        counts: k of each tensor.
        tensor: int32, for each coordinate sent, the index of its tensor.
        offsets: int64, the begin of each tensor in the flat vector.
    """

    def __init__(self, config: RandomK, layout: Layout) -> None:
        n = np.array(layout.numels, dtype=np.int64)
        a = np.ceil(np.sqrt(n)).astype(np.int64)
        b = -(-n // np.maximum(a, 1))
        self.counts = [sent_count(numel, config.density) for numel in layout.numels]
        self.tensor: npt.NDArray[np.int32] = np.repeat(np.arange(len(n), dtype=np.int32), self.counts)
        self.offsets: _I64 = np.cumsum(n) - n
        self._first: _I64 = np.cumsum(self.counts, dtype=np.int64) - np.array(self.counts, dtype=np.int64)
        self._keys: U64 = np.array([tensor_key(config.seed, name) for name in layout.names], dtype=np.uint64)
        self._n, self._a, self._b = n.astype(np.uint64), a.astype(np.uint64), b.astype(np.uint64)

    def draw(self, step: int) -> _I64:
        """Return the ascending coordinates of step ``step`` in the flat vector, int64."""
        base = draw(self._keys, step)
        keys = [draw(base, index) for index in range(ROUNDS)]
        start = draw(base, ROUNDS) % np.maximum(self._n, np.uint64(1))
        found = np.empty(len(self.tensor), dtype=np.int64)
        for low in range(0, len(found), CHUNK):
            tensor = self.tensor[low : low + CHUNK]
            rank = np.arange(low, low + len(tensor))
            if tensor[0] == tensor[-1]:
                tensor = tensor[:1]  # broadcasting one tensor's numbers is faster than an array of equal ones
            rank -= self._first[tensor]
            coordinate = self._permuted(rank.astype(np.uint64), tensor, keys)
            coordinate += start[tensor]
            _wrap(coordinate, self._n[tensor])
            np.add(coordinate.view(np.int64), self.offsets[tensor], out=found[low : low + CHUNK])
        found.sort()
        return found

    def _permuted(self, rank: U64, tensor: npt.NDArray[np.int32], keys: Sequence[U64]) -> U64:
        """Return the images of ``rank`` under the keyed permutation of each tensor.

        Values >= n, fewer than one in sqrt(n), are permuted again until they are below n.
        """
        a, b = self._a[tensor], self._b[tensor]
        x = rank // b
        y = rank - x * b  # the first ranks differ in y, so the first round hashes y
        for index, key in enumerate(keys):
            fixed, moved, side = (y, x, a) if index % 2 == 0 else (x, y, b)
            hashed = mix(key[tensor] + fixed)
            # The upper half of the product of side and the upper half is uniform in [0, side), without a division.
            hashed >>= _HALF
            hashed *= side
            hashed >>= _HALF
            moved += hashed
            _wrap(moved, side)
        x *= b
        x += y
        outside = np.flatnonzero(x >= self._n[tensor])
        if outside.size:
            x[outside] = self._permuted(x[outside], tensor if tensor.size == 1 else tensor[outside], keys)
        return x


def _wrap(value: U64, modulus: U64) -> None:
    """Compute ``value %= modulus`` in place for values below twice the modulus."""
    # If the difference is negative, it wraps to a huge number and the minimum is the value itself.
    np.minimum(value, value - modulus, out=value)


class _RandomKCodec(IndexCodec):
    """Codec of coordinates drawn by ``_Coordinates``."""

    def __init__(self, config: RandomK, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._coordinates = _Coordinates(config, layout)
        super().__init__(layout, self._coordinates.counts, dtype, device)

    def draw(self, step: int) -> _I64:
        return self._coordinates.draw(step)
