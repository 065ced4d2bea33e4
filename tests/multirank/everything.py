"""The algorithms that the contract is checked with: a few in every run, all of them in the full run."""

from __future__ import annotations

import os
from typing import Any

import horovod.torch as hvd

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

hvd.init()  # before it Horovod does not know whether it uses MPI
FULL = os.environ.get("HVD_COMPRESS_FULL") == "1"
BLOCK = RandomBlock(density=0.25)
WHOLE_SKETCH = CountSketch(density=1.0, rows=1)

# Equal to data-parallel training.
EXACT: tuple[Any, ...] = (Dense(), EF(Identity()), DEF(Identity()), DistEF(Identity()))
# Hold something back; what they select does not depend on how buckets are cut.
BLOCKS: tuple[Any, ...] = (EF(BLOCK), DEF(BLOCK))
# Hold something back.
LOSSY: tuple[Any, ...] = (*BLOCKS, DistEF(), LIEC(averaging_period=3))
if hvd.mpi_enabled():  # only what needs it: all else is checked without it
    EXACT = (GlobalTopK(1.0), GlobalSketch(WHOLE_SKETCH, "tree", masking=False))
    LOSSY = (GlobalTopK(0.25), GlobalSketch(CountSketch(columns=8, rows=3), "tree"))
elif FULL:
    EXACT += (
        LIEC(Identity(), averaging_period=3),
        GlobalSketch(WHOLE_SKETCH, masking=False),
        EF(TopK(1.0)),
        DEF(TopK(1.0)),
        DEF(RandomK(1.0)),
        Policy(DEF(Identity()), dense_dims=1),
    )
    LOSSY += (
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
