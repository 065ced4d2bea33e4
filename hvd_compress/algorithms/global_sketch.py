"""gs-SGD: a global count-sketch finds the coordinates, a second round fetches their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hvd_compress import validation
from hvd_compress.algorithms.base import BucketAlgorithm, UpdateAlgorithm, nonfinite_policy, payload_limit
from hvd_compress.algorithms.detached_ef import dense_on_updates
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm import mpi_tree
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import CountSketch
from hvd_compress.exchange import Context, Exchange, SketchExchange
from hvd_compress.finite import require_policy

EXCHANGES = ("allreduce", "tree", "allgather")


@dataclass(frozen=True)
class GlobalSketch(UpdateAlgorithm):
    """gs-SGD (2021), reconstructed: only the paper's abstract is public, the rest is Sketched-SGD's.

    The server of Sketched-SGD is replaced by a reduction of the sketch, which is linear. With u_k what the
    wrapped optimizer subtracted on rank k (its momentum stays local: momentum correction),

        v_k = v_k + u_k;   S = mean_k sketch(v_k)
        candidates = the c*K coordinates of largest |estimate(S)|;   values = mean_k v_k[candidates]
        J = the K candidates of largest |value|;   x[J] -= values[J];   v_k[J] = 0;   momentum_k[J] = 0

    v_k has the learning rate inside. Volume per rank: the table (rows x columns) by a ring or in log2(P)
    rounds of a tree, and c*K values by a ring; no indices travel.

    Args:
        sketch: size and seed of the sketch.
        exchange: how sketches are added: "allreduce" (ring), "tree" (mpi4py, log2(P) rounds; needs MPI), or
            "allgather".
        k: coordinates applied per step and bucket; None: half as many as the sketch has columns, and all
            when the sketch is exact (density 1).
        candidates: c, candidates per applied coordinate whose values are fetched.
        masking: clear the local momentum where it was sent ("momentum_buffer" in the optimizer's state, as SGD and
            RMSprop have it; others are left alone).
        clip_norm: clip the norm of the local gradient to this over the square root of the number of ranks
            before it becomes momentum; None: do not.
        dense_vectors: parameters of one dimension (biases, norms) are averaged uncompressed, as is usual.
        rescale_residual: False lets a change of learning rate change v_k in proportion.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is out of range, or (at construction of the optimizer) if "tree" is asked
            for and the job does not use MPI.
    """

    sketch: CountSketch = field(default_factory=CountSketch)
    exchange: str = "allreduce"
    k: Optional[int] = None
    candidates: int = 4
    masking: bool = True
    clip_norm: Optional[float] = None
    dense_vectors: bool = True
    rescale_residual: bool = True
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, CountSketch):
            raise ValueError(
                f"GlobalSketch: sketch={self.sketch!r} is not allowed; it must be a CountSketch, whose payload says "
                "where the large coordinates of the sum are"
            )
        if self.exchange not in EXCHANGES:
            raise ValueError(f"GlobalSketch: exchange={self.exchange!r} is not allowed; it must be one of {EXCHANGES}")
        if self.k is not None:
            validation.integer("GlobalSketch", "k", self.k, 1)
        validation.integer("GlobalSketch", "candidates", self.candidates, 1)
        validation.boolean("GlobalSketch", "masking", self.masking)
        validation.boolean("GlobalSketch", "dense_vectors", self.dense_vectors)
        validation.positive_or_none("GlobalSketch", "clip_norm", self.clip_norm)
        validation.boolean("GlobalSketch", "rescale_residual", self.rescale_residual)
        require_policy("GlobalSketch", self.nonfinite)

    def choose(self, entry: ParamEntry) -> BucketAlgorithm:
        if self.dense_vectors and entry.parameter.dim() <= 1:
            return dense_on_updates()
        return self

    def check(self, comm: Communicator) -> None:
        if self.exchange == "tree":
            mpi_tree.require("GlobalSketch: exchange='tree'", comm)

    @property
    def allreduce_only(self) -> bool:
        return self.exchange == "allreduce"

    def bucket_limit(self, ranks: int) -> float:
        # A table of given columns does not grow with the bucket.
        grows = self.sketch if self.sketch.columns is None else None
        return payload_limit(grows, ranks, gathered=self.exchange == "allgather")

    def make_exchange(self, bucket: Bucket, context: Context) -> Exchange:
        return SketchExchange(bucket, self.sketch, context, self.exchange, self.k, self.candidates)
