"""What the papers' algorithms permit: compressors, each with what it does to a vector in numpy; ways of a sketch."""

from __future__ import annotations

from typing import Callable, Optional

import horovod.torch as hvd
import reference_flat as plain
from everything import FULL

from hvd_compress import BlockSign, Compressor, CountSketch, Identity, RandomBlock, RandomK, TopK

BLOCK, RANDOM = RandomBlock(density=1 / 4, seed=5), RandomK(density=1 / 4, seed=7)
SKETCH = CountSketch(columns=16, rows=3, seed=4)
MPI = hvd.mpi_enabled


def sign_image(block_size: Optional[int]) -> Callable[..., plain.Map]:
    """On the way up a block is a whole tensor's, on the way down (a prefix is given) it ends where a shard ends."""
    return lambda cuts, prefix: plain.signs(plain.sign_blocks(block_size, cuts if prefix else plain.WHOLE))


# Compressor, and the map from a flat vector to what is decoded, given the cuts and a prefix for names.
ALL: dict[str, tuple[Compressor, Callable[..., plain.Map]]] = {
    "identity": (Identity(), lambda cuts, prefix: plain.identity),
    "block": (BLOCK, lambda cuts, prefix: plain.selected(BLOCK.selection, cuts, prefix)),
    "random": (RANDOM, lambda cuts, prefix: plain.selected(RANDOM.selection, cuts, prefix)),
    "top": (TopK(density=0.1), lambda cuts, prefix: plain.top(0.1, cuts)),
    "everything": (TopK(density=1.0), lambda cuts, prefix: plain.identity),
    "signs": (BlockSign(), sign_image(None)),
    "short signs": (BlockSign(block_size=4), sign_image(4)),
}
KINDS = ALL if FULL else {kind: ALL[kind] for kind in ("block", "top", "signs")}  # every kind of exchange, once


def exchanges() -> tuple[str, ...]:
    return ("allreduce", "allgather", "tree") if MPI() or hvd.size() == 1 else ("allreduce", "allgather")
