"""Compiled loops for count-sketches of float32 vectors on the CPU; ``compressors.sketch_hash`` has the mathematics."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from hvd_compress import native

_sketch: Any = native.load("_sketch")

MAX_ROWS = 16  # as in sketch.h
_FLOAT, _INDEX = 4, 8  # bytes


def applies(rows: int, *tensors: Tensor) -> bool:
    """Return True if the compiled loops can work on these tensors with ``rows`` rows."""
    return _sketch is not None and rows <= MAX_ROWS and all(map(native.plain, tensors))


def sketch(flat: Tensor, table: Tensor, offsets: Tensor, signs: Tensor) -> None:
    """Overwrite ``table`` with the sketch of ``flat``.

    Args:
        flat: float32, n elements.
        table: float32 (rows, columns).
        offsets: int64 (rows, blocks), contiguous, each in [0, columns).
        signs: float32 (rows, blocks), contiguous.
    """
    rows, columns = table.shape
    n, blocks = flat.numel(), offsets.shape[1]
    # A thread gets whole rows, so that the order of the additions does not depend on the number of threads.
    native.run(
        [
            partial(
                _sketch.sketch,
                flat.data_ptr(),
                table.data_ptr() + a * columns * _FLOAT,
                offsets.data_ptr() + a * blocks * _INDEX,
                signs.data_ptr() + a * blocks * _FLOAT,
                n,
                columns,
                b - a,
            )
            for a, b in native.bounds(rows, native.threads(n, rows))
        ]
    )


def estimate(table: Tensor, offsets: Tensor, signs: Tensor, out: Tensor, alpha: Optional[float] = None) -> None:
    """Write the estimates of all coordinates into ``out``, or with ``alpha`` add ``alpha`` times them to it."""
    n, blocks = out.numel(), offsets.shape[1]
    native.run(
        [
            partial(
                _sketch.estimate,
                *_addresses(table, offsets, signs, n),
                out.data_ptr(),
                a,
                b,
                alpha is not None,
                alpha or 0.0,
            )
            for a, b in native.bounds(blocks, native.threads(n, blocks))
        ]
    )


def candidate_capacity(n: int, count: int) -> int:
    """Return how many candidates ``largest`` gets room for: enough that it seldom has to discard some in between."""
    return 2 * count + n // 32 + 2**15


def largest(table: Tensor, offsets: Tensor, signs: Tensor, n: int, count: int, indices: Tensor, keys: Tensor) -> None:
    """Write the ascending indices of the ``count`` largest magnitudes among the ``n`` estimates into ``indices``.

    Of equal magnitudes the lowest indices are taken; nan counts as infinite.

    Args:
        table: float32 (rows, columns).
        offsets: int64 (rows, blocks), contiguous.
        signs: float32 (rows, blocks), contiguous.
        n: number of elements of the sketched vector.
        count: 1 <= count <= n.
        indices: int64, ``candidate_capacity(n, count)`` elements; the first ``count`` are the result.
        keys: int32, ``candidate_capacity(n, count)`` elements of scratch.

    Raises:
        ValueError: if a dtype is wrong or a number out of range.
    """
    if keys.dtype != torch.int32 or indices.dtype != torch.int64 or keys.numel() > indices.numel():
        raise ValueError("indices must be int64, keys int32 and not longer")
    _sketch.largest(*_addresses(table, offsets, signs, n), indices.data_ptr(), keys.data_ptr(), count, keys.numel())


def _addresses(table: Tensor, offsets: Tensor, signs: Tensor, n: int) -> tuple[int, ...]:
    rows, columns = table.shape
    return table.data_ptr(), offsets.data_ptr(), signs.data_ptr(), n, columns, rows
