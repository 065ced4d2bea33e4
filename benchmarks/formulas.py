"""The volume of each method by its paper's formula, and its time in the alpha-beta model.

d is the number of parameters, P the number of ranks, b the bytes of a payload. A ring sums b bytes in 2 (P-1) rounds
of b/P bytes and gathers them in P-1 rounds of b. A tree takes log2(P) rounds of b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import hvd_compress
from benchmarks.models import Shape, numel

DENSITY = 1 / 64
TOP = 1 / 1000
PERIOD = 32
RANK = 4
ROWS, SKETCH, CANDIDATES = 5, 1 / 100, 4


class Volume(NamedTuple):
    """Volume of one step of one method.

    Attributes:
        sent: bytes that leave a rank, mean over ranks.
        path: bytes that travel one after the other on the longest path.
        rounds: messages on that path.
    """

    sent: float
    path: float
    rounds: float

    def __add__(self, other: Volume) -> Volume:  # type: ignore[override]
        return Volume(*(a + b for a, b in zip(self, other)))

    def times(self, factor: float) -> Volume:
        """Return the volume of a step in which this happens ``factor`` times."""
        return Volume(*(factor * value for value in self))

    def seconds(self, alpha: float, rate: float) -> float:
        """Compute the time by the alpha-beta model: ``alpha`` seconds per message, ``rate`` bit/s, no computing."""
        return alpha * self.rounds + 8 * self.path / rate


def ring(nbytes: float, ranks: int) -> Volume:
    """Sum by ring-allreduce."""
    sent = 2 * (ranks - 1) / ranks * nbytes
    return Volume(sent, sent, 2 * (ranks - 1))


def gather(nbytes: float, ranks: int) -> Volume:
    """Send every rank's payload to all (allgather)."""
    return Volume((ranks - 1) * nbytes, (ranks - 1) * nbytes, ranks - 1)


def scatter(nbytes: float, ranks: int) -> Volume:
    """Send a piece of the payload to each other rank (alltoall)."""
    sent = (ranks - 1) / ranks * nbytes
    return Volume(sent, sent, ranks - 1)


def doubling(nbytes: float, ranks: int) -> Volume:
    """Sum by recursive doubling; ranks beyond a power of two send theirs to a partner and receive the result."""
    core = 1 << (ranks.bit_length() - 1)
    rounds = math.log2(core) + (2 if ranks > core else 0)
    sent = (core * math.log2(core) + 2 * (ranks - core)) / ranks * nbytes
    return Volume(sent, rounds * nbytes, rounds)


def up_and_down(nbytes: float, ranks: int) -> Volume:
    """Send up a binomial tree, merging where branches meet, and down again."""
    rounds = 2 * math.ceil(math.log2(ranks))
    return Volume(2 * (ranks - 1) / ranks * nbytes, rounds * nbytes, rounds)


class Model(NamedTuple):
    """The figures of a network that the formulas need.

    Attributes:
        elements: d.
        vectors: elements of its one-dimensional parameters.
        blocks: elements of one random block per tensor.
        factors: elements of the low-rank factors, and of the parameters that are sent whole instead.
    """

    elements: int
    vectors: int
    blocks: int
    factors: int


def model_of(shapes: list[Shape]) -> Model:
    """Count the elements that the formulas need."""
    factors = 0
    for shape in shapes:
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(RANK, rows, columns)
        whole = len(shape) < 2 or rank * (rows + columns) >= rows * columns
        factors += rows * columns if whole else rank * (rows + columns)
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) < 2)
    blocks = sum(max(1, math.floor(math.prod(shape) * DENSITY)) for shape in shapes)
    return Model(numel(shapes), vectors, blocks, factors)


def _two_way(model: Model, ranks: int) -> Volume:
    nbytes = model.elements / 8
    return scatter(nbytes, ranks) + gather(nbytes / ranks, ranks)


def _liec(model: Model, ranks: int) -> Volume:
    return _two_way(model, ranks).times(1 - 1 / PERIOD) + ring(8 * model.elements, ranks).times(1 / PERIOD)


def _sketched(add: Callable[[float, int], Volume]) -> Callable[[Model, int], Volume]:
    def volume(model: Model, ranks: int) -> Volume:
        width = (model.elements - model.vectors) * SKETCH / ROWS
        values = CANDIDATES * width / 2  # K is half as many as columns
        return add(4 * ROWS * width, ranks) + ring(4 * values, ranks) + ring(4 * model.vectors, ranks)

    return volume


class Method(NamedTuple):
    """A method of the table.

    Attributes:
        formula: bytes per rank and step, as text.
        build: the algorithm; None for Horovod's own optimizer.
        volume: the formula.
        steps: number of steps after which it repeats.
        mpi: True if it needs MPI.
    """

    formula: str
    build: Callable[[], Any] | None
    volume: Callable[[Model, int], Volume]
    steps: int = 4
    mpi: bool = False


def _sketch(exchange: str) -> Callable[[], Any]:
    return lambda: hvd_compress.GlobalSketch(hvd_compress.CountSketch(SKETCH, rows=ROWS), exchange)


_BLOCK = hvd_compress.RandomBlock(density=DENSITY)
METHODS: dict[str, Method] = {
    "Horovod": Method("2(P-1)/P 4d", None, lambda m, p: ring(4 * m.elements, p)),
    "Dense": Method("2(P-1)/P 4d", hvd_compress.Dense, lambda m, p: ring(4 * m.elements, p)),
    "EF, block 1/64": Method("2(P-1)/P 4d/64", lambda: hvd_compress.EF(_BLOCK), lambda m, p: ring(4 * m.blocks, p)),
    "DEF, block 1/64": Method("2(P-1)/P 4d/64", lambda: hvd_compress.DEF(_BLOCK), lambda m, p: ring(4 * m.blocks, p)),
    "DistEF, 1 bit": Method("2(P-1)/P d/8", hvd_compress.DistEF, _two_way),
    "LIEC, 1 bit, period 32": Method(
        "2(P-1)/P (d/8 31/32 + 8d/32)", lambda: hvd_compress.LIEC(averaging_period=PERIOD), _liec, PERIOD
    ),
    "EF, 1 bit (MEM-SGD)": Method(
        "(P-1) d/8", lambda: hvd_compress.EF(hvd_compress.BlockSign()), lambda m, p: gather(m.elements / 8, p)
    ),
    "EF, top 1/1000": Method(
        "2(P-1) 4k, k = d/1000",
        lambda: hvd_compress.EF(hvd_compress.TopK(TOP)),
        lambda m, p: gather(8 * TOP * m.elements, p),
    ),
    "EF, PowerSGD rank 4": Method(
        "2(P-1)/P 4 sum 4(n+m)",
        lambda: hvd_compress.EF(hvd_compress.LowRank(RANK)),
        lambda m, p: ring(4 * m.factors, p),
    ),
    "gs-SGD, ring": Method("2(P-1)/P 4(rc + 4K + v)", _sketch("allreduce"), _sketched(ring)),
    "gs-SGD, gathered (Sketched-SGD)": Method(
        "(P-1) 4rc + 2(P-1)/P 4(4K + v)", _sketch("allgather"), _sketched(gather)
    ),
    "gs-SGD, tree": Method("log2(P) 4rc + 2(P-1)/P 4(4K + v)", _sketch("tree"), _sketched(doubling), mpi=True),
    "gTop-k, 1/1000": Method(
        "2(P-1)/P 8k, k = d/1000",
        lambda: hvd_compress.GlobalTopK(density=TOP),
        lambda m, p: up_and_down(8 * TOP * m.elements, p),
        mpi=True,
    ),
}
