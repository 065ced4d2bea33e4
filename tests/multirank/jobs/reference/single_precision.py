"""The papers' algorithms in float32, in which users train and the compiled loops work, equal numpy in float64."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, DistEF, GlobalSketch, GlobalTopK, LowRank, TopK
from tests.multirank.support import reference, reference_flat
from tests.multirank.support import reference_compressors as maps
from tests.multirank.support.cases import cases, name_of
from tests.multirank.support.compressor_cases import BLOCK, EXCHANGES, KINDS, SKETCH, Kind, with_trees
from tests.multirank.support.internals import compiled_loops_apply
from tests.multirank.support.reference_checks import compare, heavy_ball, nesterov

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2, 3)
# Signs and selections magnify rounding from step to step: after 100 steps errors of 1e-7 have become 3e-5.
STEPS = 40


def schedule(t: int) -> float:
    """Return the learning rate of step ``t``."""
    return 0.019 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def single(algorithm: Any, expected: reference_flat.FlatRun, make: Any = nesterov, tolerance: float = 1e-5) -> None:
    """Compare in float32."""
    compare(algorithm, expected, make, tolerance, schedule, torch.float32)


def check_the_compiled_loops_are_used() -> None:
    assert compiled_loops_apply(torch.zeros(9, device="cpu")), "the other checks would compare the slow way only"


@cases(KINDS)
def check_error_feedback(kind: Kind) -> None:
    single(EF(kind.compressor), reference_flat.error_feedback(hvd.size(), STEPS, kind.alone, schedule, nesterov))


@cases(KINDS)
def check_detached_ef(kind: Kind) -> None:
    single(DEF(kind.compressor, 0.3), reference_flat.detached(hvd.size(), STEPS, 0.3, kind.alone, schedule, nesterov))


@cases(KINDS)
def check_dist_ef(kind: Kind) -> None:
    cuts = maps.borders(hvd.size())
    up, down = kind.image(cuts, ""), kind.image(cuts, "server/")
    single(DistEF(kind.compressor), reference_flat.dist_ef(hvd.size(), STEPS, up, down, schedule, nesterov))


@cases(KINDS)
def check_liec(kind: Kind) -> None:
    cuts = maps.borders(hvd.size())
    up, down = kind.image(cuts, ""), kind.image(cuts, "server/")
    expected = reference_flat.liec(hvd.size(), STEPS, 8, up, down, schedule, reference.SGD)
    single(LIEC(kind.compressor, 8), expected, reference.SGD)


# Algorithm, and the reference's coefficient, compressor and further arguments.
_BLOCK, _TOP = maps.alone(maps.selected(BLOCK.selection)), maps.alone(maps.top(0.1))
OPTIONS: list[tuple[DEF, Any, maps.Joint, dict[str, Any]]] = [
    (DEF(BLOCK, "auto"), None, _BLOCK, {}),
    (DEF(BLOCK, 0.3, rescale_residual=False), 0.3, _BLOCK, {"rescale": False}),
    (DEF(TopK(0.1), 0.0, masking=True, clip_norm=1.0), 0.0, _TOP, {"masking": True, "clip": 1.0}),
]


@cases({name_of(option[0]): option for option in OPTIONS})
def check_options_of_detached_ef(option: tuple[DEF, Any, maps.Joint, dict[str, Any]]) -> None:
    algorithm, coefficient, joint, arguments = option
    expected = reference_flat.detached(hvd.size(), STEPS, coefficient, joint, schedule, nesterov, **arguments)
    single(algorithm, expected)


def check_low_rank() -> None:
    expected = reference_flat.error_feedback(hvd.size(), STEPS, maps.power_sgd(1), schedule, nesterov)
    # The factors turn where singular values are close, and turn errors of rounding with them.
    single(EF(LowRank(1)), expected, tolerance=1e-4)


@cases(exchange=EXCHANGES)
def check_global_sketch(exchange: str) -> None:
    expected = reference_flat.global_sketch(hvd.size(), STEPS, 8, 4, maps.matrix_of(SKETCH), schedule, heavy_ball, True)
    single(GlobalSketch(SKETCH, exchange, dense_vectors=False), expected, heavy_ball)


@with_trees
def check_global_topk() -> None:
    single(GlobalTopK(0.1), reference_flat.global_topk(hvd.size(), STEPS, 0.1, schedule, heavy_ball), heavy_ball)
