"""Counter-based random numbers (SplitMix64): pure functions of (seed, tensor name, step), the same on every rank.

Every draw exists for numpy arrays of uint64 on the host and, with the same bits, for int64 tensors on any device, where
it saves a transfer that the host would wait for. ``mix``/``_mixed``, ``draw``/``draw_on_device`` are such pairs.
"""

from __future__ import annotations

import hashlib
from typing import Optional

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

U64 = npt.NDArray[np.uint64]
_WORD = 2**64
# SplitMix64: the increment of its counter, and the shifts and factors of its finaliser.
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def tensor_key(seed: int, name: str) -> int:
    """Return the 64-bit key of (seed, tensor name); the same in every process, whatever PYTHONHASHSEED."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# -- numpy, on the host ----------------------------------------------------------------------------------


def draw(keys: U64, step: int) -> U64:
    """Return output ``step`` (from 0) of a SplitMix64 generator seeded with each key, without computing others."""
    return mix(keys + np.uint64((step + 1) * _GAMMA % _WORD))


def mix(z: U64, scratch: Optional[U64] = None) -> U64:
    """Overwrite ``z`` with its image under SplitMix64's finaliser, a bijection, and return it.

    ``scratch`` is memory of the same shape.
    """
    shifted = np.empty_like(z) if scratch is None else scratch
    for shift, factor in _ROUNDS:
        np.right_shift(z, np.uint64(shift), out=shifted)
        np.bitwise_xor(z, shifted, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    np.right_shift(z, np.uint64(_LAST_SHIFT), out=shifted)
    return np.bitwise_xor(z, shifted, out=z)


# -- torch, on any device --------------------------------------------------------------------------------


def draw_on_device(keys: Tensor, step: int) -> Tensor:
    """Return output ``step`` (from 0) of a generator seeded with each int64 key: ``draw`` for tensors."""
    return _mixed(keys + _as_int64((step + 1) * _GAMMA))


def outputs(key: int, count: int, device: torch.device) -> Tensor:
    """Return the first ``count`` outputs of the generator seeded with ``key``, as int64."""
    return _mixed(torch.arange(1, count + 1, device=device) * _as_int64(_GAMMA) + _as_int64(key))


def uniform_below(bits: Tensor, bound: int) -> Tensor:
    """Return int64 numbers, uniform in [0, bound), made from all bits but the lowest."""
    return _shifted(bits, 1).remainder_(bound)


def signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return +1 where the lowest bit is 0, and -1 where it is 1."""
    return (1 - 2 * (bits & 1)).to(dtype)


def nearly_normal(key: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return a float32 matrix of numbers with mean 0 and variance 1: sums of four uniform ones.

    All ranks need the same matrix, but logarithms and cosines, from which normal numbers are made, differ in the last
    bit between processors. Here every number is an integer of 18 bits times the same constant.
    """
    bits = outputs(key, shape[0] * shape[1], device)
    total = (bits & 0xFFFF) + (_shifted(bits, 16) & 0xFFFF) + (_shifted(bits, 32) & 0xFFFF) + _shifted(bits, 48)
    # Each of the four has variance (2^32 - 1) / 12.
    return (total - 2 * 0xFFFF).to(torch.float32).mul_((3 / (2**32 - 1)) ** 0.5).view(shape)


def _mixed(z: Tensor) -> Tensor:
    """Return the image of ``z`` under SplitMix64's finaliser: ``mix`` for tensors."""
    for shift, factor in _ROUNDS:
        z = (z ^ _shifted(z, shift)) * _as_int64(factor)
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Return ``z`` shifted to the right logically; torch's own shift keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _as_int64(value: int) -> int:
    """Return the int64 that has the lowest 64 bits of ``value``."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
