"""What the four papers are compared with, and at which learning rates: the cases of papers.py."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

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
    RandomBlock,
)

# Of the network's 20,490 parameters. Sketched-SGD's sketches are gathered: at 8 ranks a quarter of the columns
# of gs-SGD's make about the same volume per rank.
COLUMNS, K = 512, 256
BLOCK = RandomBlock(density=1 / 64)


class Case(NamedTuple):
    """One method: how it is built, what SGD is wrapped, and the learning rates that are tried when tuning.

    Attributes:
        question: the comparison it belongs to.
        grid: learning rates; the middle one is where tuning starts from.
        mpi: whether it needs MPI.
    """

    question: str
    build: Callable[[], Any]
    momentum: float
    nesterov: bool
    grid: tuple[float, ...]
    mpi: bool = False


FAST = (0.025, 0.05, 0.1)  # with momentum 0.9
PLAIN = (0.1, 0.3, 0.6)  # without
ONE_BIT, TWO_WAY, SKETCHES, BLOCKS = "dist-EF", "LIEC", "gs-SGD", "DEF"

CASES: dict[str, Case] = {
    "full precision, Nesterov": Case(ONE_BIT, Dense, 0.9, True, FAST),
    "dist-EF-blockSGDM": Case(ONE_BIT, DistEF, 0.9, True, FAST),
    "full precision, SGD": Case(TWO_WAY, Dense, 0.0, False, PLAIN),
    "LIEC, 1 bit": Case(TWO_WAY, LIEC, 0.0, False, PLAIN),
    "DoubleSqueeze, 1 bit": Case(TWO_WAY, DistEF, 0.0, False, PLAIN),
    "MEM-SGD, 1 bit": Case(TWO_WAY, lambda: EF(BlockSign()), 0.0, False, PLAIN),
    "LIEC, block 1/64": Case(TWO_WAY, lambda: LIEC(BLOCK), 0.0, False, PLAIN),
    "DoubleSqueeze, block 1/64": Case(TWO_WAY, lambda: DistEF(BLOCK), 0.0, False, PLAIN),
    "MEM-SGD, block 1/64": Case(TWO_WAY, lambda: EF(BLOCK), 0.0, False, PLAIN),
    "gs-SGD (reconstruction)": Case(
        SKETCHES, lambda: GlobalSketch(CountSketch(columns=COLUMNS), k=K), 0.9, False, FAST
    ),
    "Sketched-SGD": Case(
        SKETCHES, lambda: GlobalSketch(CountSketch(columns=COLUMNS // 4), "allgather", k=K), 0.9, False, FAST
    ),
    "gTop-k": Case(SKETCHES, lambda: GlobalTopK(density=1 / 25), 0.9, False, FAST, mpi=True),
    "DEF, block 1/64": Case(BLOCKS, lambda: DEF(BLOCK), 0.9, False, (0.05,)),
    "EF, block 1/64": Case(BLOCKS, lambda: DEF(BLOCK, 0.0), 0.9, False, (0.05,)),
    "EF, block 1/64, lr / 5": Case(BLOCKS, lambda: DEF(BLOCK, 0.0), 0.9, False, (0.01,)),
}
