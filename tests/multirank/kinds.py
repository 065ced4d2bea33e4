"""Compressors that the papers' algorithms permit, each with what it does to a vector in numpy."""

from __future__ import annotations

from typing import Callable, Optional

import reference_flat as plain
from everything import FULL

from hvd_compress import BlockSign, Compressor, Identity, RandomBlock, RandomK, TopK

BLOCK, RANDOM = RandomBlock(density=1 / 4, seed=5), RandomK(density=1 / 4, seed=7)


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
