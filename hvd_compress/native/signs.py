"""Compiled loops for the one-bit signs of float32 vectors on the CPU; ``compressors.sign`` has the mathematics."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_compress import native

_signs: Any = native.load("_signs")

_I64 = npt.NDArray[np.int64]


def applies(flat: Tensor, bits: Tensor) -> bool:
    """Return True if the compiled loops can work on this vector and these bytes of signs."""
    return _signs is not None and native.plain(flat) and native.plain(bits, torch.uint8)


def pack(flat: Tensor, bits: Tensor, ends: _I64) -> npt.NDArray[np.float64]:
    """Write the bits ``flat >= 0`` and return the sum of the absolute values of each block.

    Args:
        flat: float32, n elements; ``applies`` to it and to ``bits``.
        bits: uint8, ceil(n / 8) elements; element i becomes bit i % 8 of byte i // 8, unused bits 0.
        ends: int64, the ascending ends of the blocks; the last one is n.

    Returns:
        float64, one sum per block.

    Raises:
        ValueError: if the lengths do not fit together.
    """
    borders = _borders(flat, bits, ends)
    parts = np.zeros((len(borders), len(ends)))
    native.run(
        [
            partial(
                _signs.pack, flat.data_ptr(), bits.data_ptr(), ends.ctypes.data, row.ctypes.data, len(ends), *border
            )
            for row, border in zip(parts, borders)
        ]
    )
    sums: npt.NDArray[np.float64] = parts.sum(axis=0)
    return sums


def add(bits: Tensor, flat: Tensor, ends: _I64, factors: npt.NDArray[np.float32]) -> None:
    """Add ``factors[b]`` to ``flat`` where the bit is 1 and subtract it where the bit is 0, in each block b.

    Args:
        bits: uint8, see ``pack``.
        flat: float32, n elements, changed in place.
        ends: int64, see ``pack``.
        factors: float32, one per block.

    Raises:
        ValueError: if the lengths do not fit together.
    """
    borders = _borders(flat, bits, ends)
    if len(factors) != len(ends) or not factors.flags.c_contiguous or factors.dtype != np.float32:
        raise ValueError(f"{len(ends)} float32 factors wanted, not {factors.dtype} {factors.shape}")
    native.run(
        [
            partial(
                _signs.add, bits.data_ptr(), flat.data_ptr(), ends.ctypes.data, factors.ctypes.data, len(ends), *border
            )
            for border in borders
        ]
    )


def _borders(flat: Tensor, bits: Tensor, ends: _I64) -> list[tuple[int, int]]:
    """Return one slice of elements per thread, cut at whole bytes.

    Raises:
        ValueError: if the lengths do not fit together. The C code does not check them.
    """
    n = flat.numel()
    if bits.numel() != (n + 7) // 8 or ends.dtype != np.int64 or not ends.flags.c_contiguous:
        raise ValueError(f"{bits.numel()} bytes for {n} signs, ends of blocks {ends.dtype}")
    if (int(ends[-1]) if len(ends) else 0) != n:
        raise ValueError(f"blocks end at {ends[-1:]}, the vector at {n}")
    return [(8 * a, min(n, 8 * b)) for a, b in native.bounds((n + 7) // 8, native.threads(n, n))]
