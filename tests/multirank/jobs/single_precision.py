"""The papers' algorithms in float32, in which users train and the compiled loops work, against numpy in float64."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import reference
import reference_flat as plain
import reference_more as more
import torch
from comparing import compare, heavy_ball, nesterov
from kinds import BLOCK, KINDS, SKETCH, exchanges
from reference_more import matrix_of

from hvd_compress import DEF, EF, LIEC, DistEF, GlobalSketch, GlobalTopK, LowRank, TopK, native

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2, 3)
# Signs and selections magnify rounding from step to step: after 100 steps errors of 1e-7 have become 3e-5.
STEPS = 40


def schedule(t: int) -> float:
    return 0.019 if t < STEPS // 2 else 0.002 * (1 + t % 3)


def single(algorithm: Any, expected: plain.FlatRun, make: Any = nesterov, tolerance: float = 1e-5) -> None:
    compare(algorithm, expected, make, tolerance, schedule, torch.float32)


def check_the_compiled_loops_are_there() -> None:
    vector = torch.zeros(9)
    assert native.applies(vector, vector, vector), "the other checks would compare the slow way only"


def check_one_way() -> None:
    for compressor, image in KINDS.values():
        whole = plain.alone(image(plain.WHOLE, ""))
        single(EF(compressor), plain.error_feedback(hvd.size(), STEPS, whole, schedule, nesterov))
        single(DEF(compressor, 0.3), plain.detached(hvd.size(), STEPS, 0.3, whole, schedule, nesterov))


def check_two_way() -> None:
    cuts = plain.borders(hvd.size())
    for compressor, image in KINDS.values():
        up, down = image(cuts, ""), image(cuts, "server/")
        single(DistEF(compressor), plain.dist_ef(hvd.size(), STEPS, up, down, schedule, nesterov))
        expected = plain.liec(hvd.size(), STEPS, 8, up, down, schedule, reference.SGD)
        single(LIEC(compressor, 8), expected, reference.SGD)


def check_options_of_detached_error_feedback() -> None:
    block, top = plain.alone(plain.selected(BLOCK.selection)), plain.alone(plain.top(0.1))
    single(DEF(BLOCK, "auto"), plain.detached(hvd.size(), STEPS, None, block, schedule, nesterov))
    expected = plain.detached(hvd.size(), STEPS, 0.3, block, schedule, nesterov, rescale=False)
    single(DEF(BLOCK, 0.3, rescale_residual=False), expected)
    expected = plain.detached(hvd.size(), STEPS, 0.0, top, schedule, nesterov, masking=True, clip=1.0)
    single(DEF(TopK(0.1), 0.0, masking=True, clip_norm=1.0), expected)


def check_low_rank() -> None:
    expected = plain.error_feedback(hvd.size(), STEPS, more.power_sgd(1), schedule, nesterov)
    # The factors turn where singular values are close, and turn errors of rounding with them.
    single(EF(LowRank(1)), expected, tolerance=1e-4)


def check_found_together() -> None:
    expected = plain.global_sketch(hvd.size(), STEPS, 8, 4, matrix_of(SKETCH), schedule, heavy_ball, True)
    for exchange in exchanges():
        single(GlobalSketch(SKETCH, exchange, dense_vectors=False), expected, heavy_ball)
    if "tree" in exchanges():
        single(GlobalTopK(0.1), plain.global_topk(hvd.size(), STEPS, 0.1, schedule, heavy_ball), heavy_ball)


if __name__ == "__main__":
    harness.main(globals())
