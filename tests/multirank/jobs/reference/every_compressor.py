"""Every algorithm with every compressor that it permits: equal to numpy at every step."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd

from hvd_compress import DEF, EF, LIEC, BlockSign, DistEF, TopK
from tests.multirank.support import reference, reference_flat
from tests.multirank.support import reference_compressors as maps
from tests.multirank.support.cases import cases
from tests.multirank.support.compressor_cases import ALL, KINDS, Kind
from tests.multirank.support.reference_checks import STEPS, compare, nesterov, schedule

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


def both_ways(worker: Kind, server: Kind) -> tuple[maps.Map, maps.Map]:
    """Return the maps of the workers' payloads and of the server's, both cut into shards."""
    cuts = maps.borders(hvd.size())
    return worker.image(cuts, ""), server.image(cuts, "server/")


@cases(kind=KINDS, rescale=(True, False))
def check_error_feedback(kind: Kind, rescale: bool) -> None:
    expected = reference_flat.error_feedback(hvd.size(), STEPS, kind.alone, schedule, nesterov, rescale)
    compare(EF(kind.compressor, rescale_residual=rescale), expected, nesterov)


@cases(KINDS)
def check_detached_ef(kind: Kind) -> None:
    expected = reference_flat.detached(hvd.size(), STEPS, 0.3, kind.alone, schedule, nesterov)
    compare(DEF(kind.compressor, 0.3), expected, nesterov)


@cases(KINDS)
def check_dist_ef(kind: Kind) -> None:
    expected = reference_flat.dist_ef(hvd.size(), STEPS, *both_ways(kind, kind), schedule, nesterov)
    compare(DistEF(kind.compressor), expected, nesterov)


def check_dist_ef_with_another_server() -> None:
    expected = reference_flat.dist_ef(hvd.size(), STEPS, *both_ways(ALL["signs"], ALL["top"]), schedule, nesterov)
    compare(DistEF(BlockSign(), TopK(0.1)), expected, nesterov)


@cases(kind=KINDS, settings={"plain": (reference.SGD, True), "nesterov, not rescaled": (nesterov, False)})
def check_liec(kind: Kind, settings: Any) -> None:
    make, rescale = settings
    expected = reference_flat.liec(hvd.size(), STEPS, 8, *both_ways(kind, kind), schedule, make, rescale)
    compare(LIEC(kind.compressor, 8, rescale_residual=rescale), expected, make)
