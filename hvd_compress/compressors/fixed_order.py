"""Linear algebra that rounds alike on every processor.

Libraries choose the order of a sum, and whether a product is fused with it, by the instruction set. Ranks that must
have the same bits cannot rely on them. Here every sum is a fixed sequence of elementwise operations, which IEEE 754
defines to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_compress import native

# A column is noise if it lies within so many units of rounding in the span of those before it.
NOISE = 64.0
# Elements of a tile: temporary products stay in the cache of a CPU, and small beside the model on an accelerator.
TILE, ACCELERATOR_TILE = 2**16, 2**22


def orthonormalise(batch: Tensor) -> None:
    """Make the columns of each matrix of ``batch`` orthonormal in place, by Gram-Schmidt, twice for each column.

    A column that the ones before it span up to rounding becomes zero; one that is not finite becomes nan.

    Args:
        batch: (number, rows, columns), float32 or float64.
    """
    number, rows, columns = batch.shape
    if not batch.numel():
        return
    padded = batch.new_zeros((columns, number, 1 << (rows - 1).bit_length()))
    padded[:, :, :rows] = batch.permute(2, 0, 1)
    limit = (NOISE * torch.finfo(batch.dtype).eps) ** 2
    for j in range(columns):
        # Scaled to a largest element of 1, so that squares neither overflow nor vanish.
        largest = padded[j].abs().amax(dim=1, keepdim=True)
        column = torch.where(largest == 0, padded[j], padded[j] / largest)
        before = ordered_sum(column * column)
        for _ in range(2 if j else 0):
            overlaps = ordered_sum(padded[:j] * column)
            for former, overlap in zip(padded[:j], overlaps):
                column = column - former * overlap
        size = ordered_sum(column * column)
        # The comparison is false for nan, which stays visible.
        padded[j] = torch.where(size <= before * limit, torch.zeros_like(column), column / size.sqrt())
    batch.copy_(padded[:, :, :rows].permute(1, 2, 0))


def ordered_sum(values: Tensor) -> Tensor:
    """Return the sum along the last dimension, whose length is a power of two, by adding halves; it has length 1."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values


def add_product(target: Tensor, p: Tensor, q: Tensor, alpha: float) -> None:
    """Add ``alpha * p @ q.T`` to ``target``, each element's terms in the order of the columns.

    Args:
        target: (n, m), contiguous.
        p: (n, r).
        q: (m, r).
        alpha: factor of the product.
    """
    columns = q.t().contiguous()
    if native.applies(target, p, columns):
        native.add_product(target, p, columns, alpha)
        return
    tile = max(1, (TILE if target.device.type == "cpu" else ACCELERATOR_TILE) // max(1, len(q)))
    for part, factors in zip(torch.split(target, tile), torch.split(p, tile)):
        product = factors[:, :1] * columns[0]
        for c in range(1, len(columns)):
            product.add_(factors[:, c : c + 1] * columns[c])
        part.add_(product.mul_(alpha))
