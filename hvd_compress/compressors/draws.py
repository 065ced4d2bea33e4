"""Random numbers as pure functions of (seed, tensor name, step): the same on every rank, in any order."""

from __future__ import annotations

import hashlib
import math
from typing import Optional

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]


def tensor_key(seed: int, name: str) -> int:
    """64-bit key of (seed, tensor name); the same in every process, whatever PYTHONHASHSEED."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw(keys: U64, step: int) -> U64:
    """The ``step``-th output of a SplitMix64 generator seeded with each key: random access, no state."""
    return mix(keys + np.uint64((step + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))


def mix(z: U64, scratch: Optional[U64] = None) -> U64:
    """Overwrite ``z`` with its image under SplitMix64's finaliser, a bijection, and return it.

    ``scratch`` is memory of the same shape.
    """
    shifted = np.empty_like(z) if scratch is None else scratch
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(z, np.uint64(shift), out=shifted)
        np.bitwise_xor(z, shifted, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    np.right_shift(z, np.uint64(31), out=shifted)
    return np.bitwise_xor(z, shifted, out=z)


def kept(numel: int, density: float) -> int:
    """How many of ``numel`` elements are sent: ``max(1, floor(numel * density))``, and 0 of an empty tensor."""
    return max(1, math.floor(numel * density)) if numel else 0
