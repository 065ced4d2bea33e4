"""Digests of vectors: 63 bits and a sign that depend on every bit of a vector, and on where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_compress import native

MULTIPLIER = 2654435761
MASK = 2**32 - 1
# Elements of a tile: temporary products stay in the cache of a CPU, and small beside the model on an accelerator.
TILE, ACCELERATOR_TILE = 2**16, 2**22


def digest(values: Tensor) -> Tensor:
    """Return an int64 (0-dimensional, on the vector's device) that changes if any element of ``values`` does.

    It is the sum of the elements' bits, each times an odd number that depends on its place. Compiled loops, CPUs and
    accelerators compute the same.
    """
    if native.applies(values):
        total = torch.tensor(native.digest(values), dtype=torch.int64, device="cpu")
    else:
        words = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        tile = TILE if words.device.type == "cpu" else ACCELERATOR_TILE
        places = torch.arange(min(tile, words.numel()), device=words.device)
        for index, part in enumerate(torch.split(words, tile)):
            factors = (places[: part.numel()] + index * tile) * MULTIPLIER & MASK | 1
            total += ((part.to(torch.int64) & MASK) * factors).sum()
    return total ^ (total >> 32)  # of round numbers the low bits are zeros
