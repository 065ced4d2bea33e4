"""Every algorithm with every compressor it permits: equal to numpy, mass kept, replicas equal, step by step."""

from __future__ import annotations

from typing import Callable, Optional

import harness
import horovod.torch as hvd
import reference
import reference_flat as plain
from comparing import STEPS, compare, keep_mass, nesterov, schedule
from everything import FULL

from hvd_compress import DEF, EF, LIEC, BlockSign, Cast, Compressor, DistEF, Identity, RandomBlock, RandomK, TopK

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
BLOCK, RANDOM = RandomBlock(density=1 / 4, seed=5), RandomK(density=1 / 4, seed=7)


def sign_image(block_size: Optional[int]) -> Callable[..., plain.Map]:
    """On the way up a block is a whole tensor's, on the way down (a prefix is given) it ends where a shard ends."""
    return lambda cuts, prefix: plain.signs(plain.sign_blocks(block_size, cuts if prefix else plain.WHOLE))


# Compressor, and the map from a flat vector to what is decoded, given the cuts and a prefix for names.
KINDS: dict[str, tuple[Compressor, Callable[..., plain.Map]]] = {
    "identity": (Identity(), lambda cuts, prefix: plain.identity),
    "block": (BLOCK, lambda cuts, prefix: plain.selected(BLOCK.selection, cuts, prefix)),
    "random": (RANDOM, lambda cuts, prefix: plain.selected(RANDOM.selection, cuts, prefix)),
    "top": (TopK(density=0.1), lambda cuts, prefix: plain.top(0.1, cuts)),
    "everything": (TopK(density=1.0), lambda cuts, prefix: plain.identity),
    "signs": (BlockSign(), sign_image(None)),
    "short signs": (BlockSign(block_size=4), sign_image(4)),
}
if not FULL:  # every kind of exchange, once
    KINDS = {kind: KINDS[kind] for kind in ("block", "top", "signs")}


def whole(image: Callable[..., plain.Map]) -> plain.Joint:
    return plain.alone(image(plain.WHOLE, ""))


def check_error_feedback() -> None:
    for compressor, image in KINDS.values():
        for rescale in (True, False):
            expected = plain.error_feedback(hvd.size(), STEPS, whole(image), schedule, nesterov, rescale)
            compare(EF(compressor, rescale_residual=rescale), expected, nesterov)


def check_detached() -> None:
    for compressor, image in KINDS.values():
        expected = plain.detached(hvd.size(), STEPS, 0.3, whole(image), schedule, nesterov)
        compare(DEF(compressor, 0.3), expected, nesterov)


def check_dist_ef() -> None:
    cuts = plain.borders(hvd.size())
    for compressor, image in KINDS.values():
        up, down = image(cuts, ""), image(cuts, "server/")
        compare(DistEF(compressor), plain.dist_ef(hvd.size(), STEPS, up, down, schedule, nesterov), nesterov)
    up, down = KINDS["signs"][1](cuts, ""), KINDS["top"][1](cuts, "server/")
    mixed = plain.dist_ef(hvd.size(), STEPS, up, down, schedule, nesterov)
    compare(DistEF(BlockSign(), TopK(0.1)), mixed, nesterov)


def check_liec() -> None:
    cuts = plain.borders(hvd.size())
    for compressor, image in KINDS.values():
        up, down = image(cuts, ""), image(cuts, "server/")
        for make, rescale in ((reference.SGD, True), (nesterov, False)):
            expected = plain.liec(hvd.size(), STEPS, 8, up, down, schedule, make, rescale)
            compare(LIEC(compressor, 8, rescale_residual=rescale), expected, make)


def check_mass() -> None:
    for compressor in [*(kind[0] for kind in KINDS.values()), *([Cast()] if FULL else [])]:
        for algorithm in (EF(compressor), DEF(compressor, 0.3), DistEF(compressor), LIEC(compressor, 8)):
            # A sum of float16 payloads is rounded by the ring itself, which no rank can keep account of.
            summed_in_half = compressor == Cast() and isinstance(algorithm, (EF, DEF)) and hvd.size() > 1
            keep_mass(algorithm, tolerance=1e-3 if summed_in_half else 1e-12)


def check_mass_with_sum() -> None:
    for algorithm in (EF(TopK(0.1)), DEF(TopK(0.1)), DEF(BLOCK), DistEF(), LIEC(averaging_period=8)):
        keep_mass(algorithm, op=hvd.Sum)


if __name__ == "__main__":
    harness.main(globals())
