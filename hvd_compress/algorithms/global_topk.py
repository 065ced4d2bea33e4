"""gTop-k: the k largest coordinates of the ranks' sum, merged pairwise in log2(P) rounds (Shi et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_compress import validation
from hvd_compress.algorithms.base import UpdateAlgorithm, nonfinite_policy
from hvd_compress.bucket import Bucket
from hvd_compress.comm import mpi_tree
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import TopK
from hvd_compress.exchange import Context, Exchange, TopKTreeExchange
from hvd_compress.finite import require_policy


@dataclass(frozen=True)
class GlobalTopK(UpdateAlgorithm):
    """Global top-k: every rank offers its k largest coordinates, pairs of ranks keep the k largest of their sum.

    With u_k what the wrapped optimizer subtracted on rank k, and T keeping k coordinates,

        p_k = e_k + u_k;   offer T(p_k);   merge(a, b) = T(a + b) up a binomial tree;   x = x - merged / P

    What is not offered stays in its rank's residual; what a merge drops stays in that of the rank that merged, although
    the same coordinate may reach the root by another branch. So nothing is lost (the authors' code loses it), for
    any number of ranks. k values and int32 indices travel up and down the tree: log2(P) rounds each way.

    Args:
        density: k over the number of elements of a bucket, 0 < density <= 1.
        rescale_residual: False lets a change of learning rate change e_k in proportion.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is out of range, or (at construction of the optimizer) if the job does not
            use MPI.
    """

    density: float = 1 / 1000
    rescale_residual: bool = True
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        validation.density("GlobalTopK", self.density)
        object.__setattr__(self, "density", float(self.density))  # one repr: ranks compare it
        validation.boolean("GlobalTopK", "rescale_residual", self.rescale_residual)
        require_policy("GlobalTopK", self.nonfinite)

    @property
    def allreduce_only(self) -> bool:
        return False

    def check(self, comm: Communicator) -> None:
        mpi_tree.require("GlobalTopK", comm)

    def make_exchange(self, bucket: Bucket, context: Context) -> Exchange:
        return TopKTreeExchange(bucket, TopK(self.density), context)
