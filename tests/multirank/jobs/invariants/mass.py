"""The mass identity of every algorithm with every compressor that it permits, at each of a hundred steps."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd

from hvd_compress import DEF, EF, LIEC, BlockSign, Cast, DistEF, GlobalSketch, GlobalTopK, LowRank, TopK, Warmup
from tests.multirank.support.cases import Job, PerJob, cases, only, without_mpi
from tests.multirank.support.compressor_cases import (
    BLOCK,
    EXCHANGES,
    POLICY_OF_GRADIENTS,
    POLICY_OF_UPDATES,
    SKETCH,
    compressors,
    with_trees,
)
from tests.multirank.support.reference_checks import OPS, keep_mass

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2, 3, 4, 5)
STAGES = (1.0, 0.5)
# Average is in the quick run too, with every compressor, above.
OPS_OF_JOB = PerJob(lambda job: OPS if job.full else {"Sum": OPS["Sum"]})
once_by_mpi = only(lambda job: not job.mpi or job.ranks == 2)


def algorithms(job: Job) -> list[Any]:
    """Return every algorithm with every compressor of the job."""
    chosen = [*compressors(job), *([Cast()] if job.full else [])]
    return [algorithm for c in chosen for algorithm in (EF(c), DEF(c, 0.3), DistEF(c), LIEC(c, 8))]


@once_by_mpi
@cases(PerJob(algorithms))
def check_mass_of_every_compressor(algorithm: Any) -> None:
    # A sum of float16 payloads is rounded by the allreduce, which no rank can account for.
    summed_in_half = algorithm.compressor == Cast() and isinstance(algorithm, (EF, DEF)) and hvd.size() > 1
    keep_mass(algorithm, tolerance=1e-3 if summed_in_half else 1e-12)


@once_by_mpi
@cases(EF(TopK(0.1)), DEF(TopK(0.1)), DEF(BLOCK), DistEF(), LIEC(averaging_period=8))
def check_mass_with_sum(algorithm: Any) -> None:
    keep_mass(algorithm, op=hvd.Sum)


@without_mpi
@cases(
    algorithm=(
        EF(Warmup(TopK(0.1), STAGES, 5)),
        DEF(Warmup(BLOCK, STAGES, 5), 0.3),
        DEF(BLOCK, "auto"),
        DEF(TopK(0.1, sampled=True), 0.0, masking=True, clip_norm=1.0),
        DistEF(BLOCK, BlockSign()),
        POLICY_OF_GRADIENTS,
        POLICY_OF_UPDATES,
    ),
    op=OPS_OF_JOB,
)
def check_mass_of_options(algorithm: Any, op: Any) -> None:
    keep_mass(algorithm, op=op)


@cases(exchange=EXCHANGES, masking=(True, False), op=OPS_OF_JOB)
def check_mass_of_sketches(exchange: str, masking: bool, op: Any) -> None:
    keep_mass(GlobalSketch(SKETCH, exchange, masking=masking), op=op)


@cases(algorithm=(EF(LowRank(1)), DEF(LowRank(2), 0.3)), op=OPS_OF_JOB)
def check_mass_of_low_rank(algorithm: Any, op: Any) -> None:
    keep_mass(algorithm, op=op)


@with_trees
@cases(op=OPS_OF_JOB)
def check_mass_of_global_topk(op: Any) -> None:
    keep_mass(GlobalTopK(0.1), op=op)
