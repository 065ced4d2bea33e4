"""Compiled loops for count-sketches of CPU float32 vectors; ``compressors.rotations`` has the mathematics."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from hvd_compress import native

_sketch: Any = native.load("_sketch")

MAX_ROWS = 16
_FLOAT, _INDEX = 4, 8


def applies(rows: int, *tensors: Tensor) -> bool:
    """Whether the compiled loops can work on these tensors with so many rows."""
    return _sketch is not None and rows <= MAX_ROWS and all(map(native.plain, tensors))


def sketch(flat: Tensor, table: Tensor, offsets: Tensor, signs: Tensor) -> None:
    """Overwrite ``table`` (rows, columns) with the sketch of ``flat``; ``offsets`` (int64) and ``signs`` are
    (rows, blocks) and contiguous."""
    rows, columns = table.shape
    n, blocks = flat.numel(), offsets.shape[1]
    # Whole rows to a thread: the order of the additions, and so the bits, do not depend on their number.
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
    """``out = estimates``, or with ``alpha``: ``out += alpha * estimates``."""
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


def room(n: int, count: int) -> int:
    """How many candidates ``largest`` needs room for, so that it seldom has to tidy up."""
    return 2 * count + n // 32 + 2**15


def largest(table: Tensor, offsets: Tensor, signs: Tensor, n: int, count: int, indices: Tensor, keys: Tensor) -> None:
    """Write the indices of the ``count`` largest magnitudes of the ``n`` estimates, ascending, into ``indices``.

    Of equal ones the lowest indices are taken; nan counts as infinite. ``indices`` (int64) and ``keys`` (int32)
    are scratch of ``room(n, count)`` elements.
    """
    if keys.dtype != torch.int32 or indices.dtype != torch.int64 or keys.numel() > indices.numel():
        raise ValueError("indices must be int64, keys int32 and not longer")
    _sketch.largest(*_addresses(table, offsets, signs, n), indices.data_ptr(), keys.data_ptr(), count, keys.numel())


def _addresses(table: Tensor, offsets: Tensor, signs: Tensor, n: int) -> tuple[int, ...]:
    rows, columns = table.shape
    return table.data_ptr(), offsets.data_ptr(), signs.data_ptr(), n, columns, rows
