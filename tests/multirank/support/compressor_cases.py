"""The compressors that the papers' algorithms permit, each with its map in numpy, and the exchanges of a sketch."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

from hvd_compress import (
    DEF,
    EF,
    BlockSign,
    Compressor,
    CountSketch,
    Dense,
    DistEF,
    Identity,
    Policy,
    RandomBlock,
    RandomK,
    TopK,
)
from tests.multirank.support import reference_compressors as maps
from tests.multirank.support.cases import Job, PerJob, name_of, only

BLOCK, RANDOM = RandomBlock(density=1 / 4, seed=5), RandomK(density=1 / 4, seed=7)
SKETCH = CountSketch(columns=16, rows=3, seed=4)
# Policies with dense biases and another algorithm for one of the two matrices.
POLICY_OF_GRADIENTS = Policy(EF(BLOCK), patterns={"*bias": Dense(), "2.*": EF(TopK(0.25))})
POLICY_OF_UPDATES = Policy(DEF(BLOCK, 0.3), patterns={"*bias": Dense(), "2.*": DistEF(BlockSign(4), TopK(0.25))})


class Kind(NamedTuple):
    """A compressor, and ``image(cuts, prefix)``: its map of a flat vector cut there, its names after a prefix."""

    compressor: Compressor
    image: Callable[..., maps.Map]

    @property
    def alone(self) -> maps.Joint:
        """Return the map of a whole bucket, which each rank applies to its own vector."""
        return maps.alone(self.image(maps.WHOLE, ""))


def _sign_image(block_size: Optional[int]) -> Callable[..., maps.Map]:
    """Return the map of signs.

    On the way up a block is a whole tensor's; on the way down, where a prefix is given, it ends where a shard ends.
    """
    return lambda cuts, prefix: maps.signs(maps.sign_blocks(block_size, cuts if prefix else maps.WHOLE))


ALL: dict[str, Kind] = {
    "identity": Kind(Identity(), lambda cuts, prefix: maps.identity),
    "block": Kind(BLOCK, lambda cuts, prefix: maps.selected(BLOCK.selection, cuts, prefix)),
    "random": Kind(RANDOM, lambda cuts, prefix: maps.selected(RANDOM.selection, cuts, prefix)),
    "top": Kind(TopK(density=0.1), lambda cuts, prefix: maps.top(0.1, cuts)),
    "everything": Kind(TopK(density=1.0), lambda cuts, prefix: maps.identity),
    "signs": Kind(BlockSign(), _sign_image(None)),
    "short signs": Kind(BlockSign(block_size=4), _sign_image(4)),
}
QUICK = ("block", "top", "signs")  # every kind of exchange, once
KINDS = PerJob(lambda job: {name_of(ALL[key].compressor): ALL[key] for key in (ALL if job.full else QUICK)})


def compressors(job: Job) -> list[Compressor]:
    """Return the compressors of ``KINDS``."""
    return [ALL[key].compressor for key in (ALL if job.full else QUICK)]


def has_trees(job: Job) -> bool:
    """Return True if a job can exchange pairwise messages."""
    return job.mpi or job.ranks == 1


with_trees = only(has_trees)
EXCHANGES = PerJob(lambda job: ("allreduce", "allgather", *(("tree",) if has_trees(job) else ())))
