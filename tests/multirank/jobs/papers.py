"""Every algorithm with every compressor it permits: equal to numpy, replicas equal, step by step."""

from __future__ import annotations

from typing import Callable

import harness
import horovod.torch as hvd
import reference
import reference_flat as plain
from comparing import STEPS, compare, nesterov, schedule
from kinds import KINDS

from hvd_compress import DEF, EF, LIEC, BlockSign, DistEF, TopK

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


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


if __name__ == "__main__":
    harness.main(globals())
