"""The methods that papers.py compares, a group per paper, and the learning rates that are tried for them."""

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

# Within a group volumes are equal where the method allows it, for 8 ranks and the network's 20,490 parameters.
# Sketched-SGD sends its sketches to all, (P-1) of them: a quarter of gs-SGD's columns make the same volume.
COLUMNS, K = 512, 256
# gTop-k's pairs of value and index, 8 bytes, up and down a tree: gs-SGD's volume as the mean over ranks.
GTOPK = 0.0899
BLOCK = RandomBlock(density=1 / 64)
# LIEC's averaging steps send everything; with this density the others send as much in larger blocks.
LARGER_BLOCK = RandomBlock(density=1 / 12.9)
PERIOD = 32


class Case(NamedTuple):
    """One method: its algorithm, the SGD that it wraps, and the learning rates that are tried when tuning.

    Attributes:
        paper: the comparison it belongs to.
        grid: learning rates, rising by one factor; tuning continues beyond an end that is best. Empty: not
            tuned, see ``rate_of``.
        rate_of: the case whose learning rate is used.
    """

    paper: str
    build: Callable[[], Any]
    momentum: float
    nesterov: bool
    grid: tuple[float, ...] = ()
    rate_of: str = ""


FAST = (0.0125, 0.04, 0.125)  # with momentum 0.9
PLAIN = (0.04, 0.125, 0.4)  # without
ONE_BIT, TWO_WAY, SKETCHES, BLOCKS = "dist-EF-blockSGDM", "LIEC-SGD", "gs-SGD", "DEF"

CASES: dict[str, Case] = {
    "full precision, Nesterov": Case(ONE_BIT, Dense, 0.9, True, FAST),
    "dist-EF-blockSGDM": Case(ONE_BIT, DistEF, 0.9, True, FAST),
    # Three quarters of this network are one tensor; the paper's own have many, each with a scale.
    "dist-EF-blockSGDM, blocks of 256": Case(ONE_BIT, lambda: DistEF(BlockSign(256)), 0.9, True, FAST),
    "full precision, SGD": Case(TWO_WAY, Dense, 0.0, False, PLAIN),
    "LIEC, 1 bit": Case(TWO_WAY, lambda: LIEC(BlockSign(), averaging_period=PERIOD), 0.0, False, PLAIN),
    "DoubleSqueeze, 1 bit": Case(TWO_WAY, lambda: DistEF(BlockSign()), 0.0, False, PLAIN),
    "MEM-SGD, 1 bit": Case(TWO_WAY, lambda: EF(BlockSign()), 0.0, False, PLAIN),
    "LIEC, block 1/64": Case(TWO_WAY, lambda: LIEC(BLOCK, averaging_period=PERIOD), 0.0, False, PLAIN),
    "DoubleSqueeze, block 1/64": Case(TWO_WAY, lambda: DistEF(BLOCK), 0.0, False, PLAIN),
    "MEM-SGD, block 1/64": Case(TWO_WAY, lambda: EF(BLOCK), 0.0, False, PLAIN),
    "DoubleSqueeze, LIEC's volume": Case(TWO_WAY, lambda: DistEF(LARGER_BLOCK), 0.0, False, PLAIN),
    "MEM-SGD, LIEC's volume": Case(TWO_WAY, lambda: EF(LARGER_BLOCK), 0.0, False, PLAIN),
    "gs-SGD (reconstruction)": Case(
        SKETCHES, lambda: GlobalSketch(CountSketch(columns=COLUMNS), k=K), 0.9, False, FAST
    ),
    "Sketched-SGD": Case(
        SKETCHES, lambda: GlobalSketch(CountSketch(columns=COLUMNS // 4), "allgather", k=K), 0.9, False, FAST
    ),
    "gTop-k": Case(SKETCHES, lambda: GlobalTopK(density=GTOPK), 0.9, False, FAST),
    "full precision, momentum": Case(BLOCKS, Dense, 0.9, False, FAST),
    "DEF, block 1/64": Case(BLOCKS, lambda: DEF(BLOCK, 0.3), 0.9, False, FAST),
    "EF, block 1/64": Case(BLOCKS, lambda: EF(BLOCK), 0.9, False, FAST),
    # The baseline of DEF's authors: local momentum, updates compressed.
    "EF of updates, block 1/64": Case(BLOCKS, lambda: DEF(BLOCK, 0.0), 0.9, False, FAST),
    "EF, DEF's rate": Case(BLOCKS, lambda: EF(BLOCK), 0.9, False, rate_of="DEF, block 1/64"),
    "EF of updates, DEF's rate": Case(BLOCKS, lambda: DEF(BLOCK, 0.0), 0.9, False, rate_of="DEF, block 1/64"),
}
