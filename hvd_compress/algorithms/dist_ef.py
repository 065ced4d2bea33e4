"""dist-EF-blockSGDM: two-way compression with an error on both sides (Zheng, Huang, Kwok, NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hvd_compress import validation
from hvd_compress.algorithms.base import (
    UpdateAlgorithm,
    nonfinite_policy,
    payload_limit,
    require_combining,
    require_constant,
)
from hvd_compress.bucket import Bucket
from hvd_compress.compressors import BlockSign, Combine, Compressor
from hvd_compress.exchange import Context, Exchange, ShardedServerExchange
from hvd_compress.finite import require_policy


@dataclass(frozen=True)
class DistEF(UpdateAlgorithm):
    """Two-way error feedback on updates, the server being spread over the ranks (algorithm 2 of the paper).

    With u_k what the wrapped optimizer subtracted on rank k (for SGD with ``nesterov=True`` the learning rate
    times mu m_k + g_k + weight decay; the paper's momentum is kept by the workers, never by the server):

        p_k = e_k + u_k;  send C(p_k);  e_k = p_k - C(p_k)
        p = mean_k C(p_k) + s;  D = C'(p);  s = p - D;  x = x - D

    Updates and errors have the learning rate inside, which is the paper's factor eta_{t-1}/eta_t on errors in
    gradient units. Every rank is the server of one shard of x: about 2 (P-1)/P bits per element and rank
    travel with 1-bit compression. Blocks of ``BlockSign`` are whole tensors on the way up, tensors cut by
    shard borders on the way down.

    Args:
        compressor: what ranks send; any whose payload one rank can make alone.
        server_compressor: what the servers of shards send back; None: the same.
        rescale_residual: False lets a change of learning rate change both errors in proportion, which is the
            paper without its factor.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is not allowed.
    """

    compressor: Compressor = field(default_factory=BlockSign)
    server_compressor: Optional[Compressor] = None
    rescale_residual: bool = True
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        allowed = (Combine.SUM, Combine.GATHER)
        for argument in ("compressor", "server_compressor"):
            if (value := getattr(self, argument)) is not None or argument == "compressor":
                require_constant("DistEF", argument, require_combining("DistEF", argument, value, allowed))
        validation.boolean("DistEF", "rescale_residual", self.rescale_residual)
        require_policy("DistEF", self.nonfinite)

    @property
    def allreduce_only(self) -> bool:
        return False

    @property
    def _server(self) -> Compressor:
        return self.compressor if self.server_compressor is None else self.server_compressor

    def bucket_limit(self, ranks: int) -> float:
        return min(payload_limit(compressor, ranks, gathered=False) for compressor in (self.compressor, self._server))

    def make_exchange(self, bucket: Bucket, context: Context) -> Exchange:
        return ShardedServerExchange(bucket, self.compressor, self._server, context)
