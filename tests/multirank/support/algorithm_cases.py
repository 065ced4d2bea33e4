"""The algorithms that the contract is checked with: a few in every run, all of them in the full run."""

from __future__ import annotations

from typing import Any

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    BlockSign,
    CountSketch,
    Dense,
    DistEF,
    GlobalSketch,
    GlobalTopK,
    Identity,
    LowRank,
    Policy,
    RandomBlock,
    RandomK,
    TopK,
    Warmup,
)
from tests.multirank.support.cases import Job, PerJob

BLOCK = RandomBlock(density=0.25)
WHOLE_SKETCH = CountSketch(density=1.0, rows=1)

# Selections that do not depend on how buckets are cut.
BLOCKS: tuple[Any, ...] = (EF(BLOCK), DEF(BLOCK))

_EXACT: tuple[Any, ...] = (Dense(), DEF(Identity()))
_EXACT_FULL: tuple[Any, ...] = (
    EF(Identity()),
    DistEF(Identity()),
    LIEC(Identity(), averaging_period=3),
    GlobalSketch(WHOLE_SKETCH, masking=False),
    EF(TopK(1.0)),
    DEF(TopK(1.0)),
    DEF(RandomK(1.0)),
    Policy(DEF(Identity()), dense_dims=1),
)
_EXACT_MPI: tuple[Any, ...] = (GlobalTopK(1.0), GlobalSketch(WHOLE_SKETCH, "tree", masking=False))

_LOSSY: tuple[Any, ...] = (*BLOCKS, DistEF(), LIEC(averaging_period=3))
_LOSSY_FULL: tuple[Any, ...] = (
    EF(TopK(0.25)),
    EF(BlockSign()),
    EF(LowRank(1)),
    DEF(BlockSign(block_size=8), 1.0),
    DEF(RandomK(0.25)),
    DEF(TopK(0.1), 0.0, masking=True, clip_norm=100.0),
    DistEF(TopK(0.25), BlockSign()),
    LIEC(BLOCK, 4),
    GlobalSketch(CountSketch(columns=8, rows=3)),
    EF(Warmup(TopK(0.1), (1.0, 0.5), 3)),
    Policy(EF(BLOCK), patterns={"*bias": Dense(), "2.*": EF(TopK(0.25))}),
)
_LOSSY_MPI: tuple[Any, ...] = (GlobalTopK(0.25), GlobalSketch(CountSketch(columns=8, rows=3), "tree"))


def _choose(quick: tuple[Any, ...], more: tuple[Any, ...], mpi: tuple[Any, ...], job: Job) -> tuple[Any, ...]:
    """Return the algorithms of a job; those of MPI only need it, all others are checked without it."""
    if job.mpi:
        return mpi
    return quick + more if job.full else quick


# Equal to data-parallel training.
EXACT = PerJob(lambda job: _choose(_EXACT, _EXACT_FULL, _EXACT_MPI, job))
# With a residual.
LOSSY = PerJob(lambda job: _choose(_LOSSY, _LOSSY_FULL, _LOSSY_MPI, job))
# Also with other coefficients, and a policy of local models.
LOSSY_WITH_OPTIONS = PerJob(
    lambda job: (LOSSY, DEF(BLOCK, 0.0), DEF(BLOCK, "auto"), Policy(LIEC(BLOCK, 4), dense_dims=1))
)


def is_exact(compression: Any) -> bool:
    """Return True for the algorithms of ``EXACT``."""
    return compression in (*_EXACT, *_EXACT_FULL, *_EXACT_MPI)


def exchanges_updates(compression: Any) -> bool:
    """Return True if updates are exchanged after the wrapped optimizer's step, False if gradients are before it."""
    return bool(compression.exchanges_updates)


def allreduces_only(compression: Any) -> bool:
    """Return True if an algorithm needs no other collective than allreduce."""
    return bool(compression.allreduce_only)


def has_local_models(compression: Any) -> bool:
    """Return True if ranks train models of their own (LIEC)."""
    return bool(compression.local_models)
