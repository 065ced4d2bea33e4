"""Counter-based random numbers (SplitMix64): pure functions of (seed, tensor name, step), the same on every rank.

The first half draws with numpy on the host, the second with torch on the device, which saves it a transfer for which
the host would wait. Both give the same bits on every device and processor.
"""

from __future__ import annotations

import hashlib
import math
from typing import Optional

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

U64 = npt.NDArray[np.uint64]
_GAMMA = 0x9E3779B97F4A7C15
_WORD = 2**64


def tensor_key(seed: int, name: str) -> int:
    """64-bit key of (seed, tensor name); the same in every process, whatever PYTHONHASHSEED."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw(keys: U64, step: int) -> U64:
    """The ``step``-th output of a SplitMix64 generator seeded with each key: random access, no state."""
    return mix(keys + np.uint64((step + 1) * _GAMMA & 0xFFFFFFFFFFFFFFFF))


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


# -- on the device ---------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def outputs(key: int, count: int, device: torch.device) -> Tensor:
    """The first ``count`` outputs of the generator seeded with ``key``, as int64 with the same bits."""
    return _mix(torch.arange(1, count + 1, device=device) * _signed(_GAMMA) + _signed(key))


def at(keys: Tensor, step: int) -> Tensor:
    """The ``step``-th output of a generator seeded with each key; ``draw`` for int64 tensors."""
    return _mix(keys + _signed((step + 1) * _GAMMA))


def below(bits: Tensor, bound: int) -> Tensor:
    """Uniform int64 in [0, bound) from all bits but the lowest."""
    return _shift(bits, 1).remainder_(bound)


def signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 or -1 from the lowest bit."""
    return (1 - 2 * (bits & 1)).to(dtype)


def nearly_normal(key: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """float32 matrix of numbers of mean 0 and variance 1: sums of four uniform ones.

    Logarithms and cosines, from which normal ones are made, differ in the last bit between processors; ranks
    need the same matrix. Here every number is an integer of 18 bits times the same constant.
    """
    bits = outputs(key, shape[0] * shape[1], device)
    total = (bits & 0xFFFF) + (_shift(bits, 16) & 0xFFFF) + (_shift(bits, 32) & 0xFFFF) + _shift(bits, 48)
    # The variance of each is (2^32 - 1) / 12.
    return (total - 2 * 0xFFFF).to(torch.float32).mul_((3 / (2**32 - 1)) ** 0.5).view(shape)
