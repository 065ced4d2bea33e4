"""Every algorithm with every compressor it permits: nothing is lost at any of a hundred steps."""

from __future__ import annotations

import harness
import horovod.torch as hvd
from comparing import keep_mass
from everything import FULL
from kinds import BLOCK, KINDS

from hvd_compress import DEF, EF, LIEC, Cast, DistEF, TopK

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


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
