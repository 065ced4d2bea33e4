"""SplitMix64 in torch: random numbers that are pure functions of their place, made where they are needed.

The integers, and so what is drawn from them, are the same bits on every device and processor; drawing on the
device saves it a transfer for which the host would wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_WORD = 2**64


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
    """The ``step``-th output of a generator seeded with each key; ``draws.draw`` of int64 tensors."""
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
