"""dist-EF-blockSGDM: two-way compression with an error on both sides (Zheng, Huang, Kwok, NeurIPS 2019)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar, Optional

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, limit_for, require_combining, require_constant
from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.update_state import HeldUpdates
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors import BlockSign, Combine, Compressor
from hvd_compress.exchange import Context, ShardedServerExchange


@dataclass(frozen=True)
class DistEF(Algorithm):
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
        server_compressor: what the owners of shards send back; None: the same.
        rescale_residual: False lets a change of learning rate change what is owed in proportion, which is the
            paper without its factor.

    Raises:
        ValueError: if an argument is not allowed.
    """

    exchanges_updates: ClassVar[bool] = True

    compressor: Compressor = field(default_factory=BlockSign)
    server_compressor: Optional[Compressor] = None
    rescale_residual: bool = True

    def __post_init__(self) -> None:
        allowed = (Combine.SUM, Combine.GATHER)
        for argument in ("compressor", "server_compressor"):
            if (value := getattr(self, argument)) is not None or argument == "compressor":
                require_constant("DistEF", argument, require_combining("DistEF", argument, value, allowed))
        validation.boolean("DistEF", "rescale_residual", self.rescale_residual)

    @property
    def gathers(self) -> bool:
        return True

    def bucket_limit(self, ranks: int) -> float:
        both = (self.compressor, self.server_compressor or self.compressor)
        return min(limit_for(compressor, ranks, gathered=False) for compressor in both)

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _DistEFState(self, bucket, context)


class _DistEFState(HeldUpdates):
    """The parameters hold x itself; ``held`` is the worker's error, ``exchange.error`` the server's."""

    def __init__(self, config: DistEF, bucket: Bucket, context: Context) -> None:
        super().__init__(bucket, context, config.rescale_residual)
        server = config.compressor if config.server_compressor is None else config.server_compressor
        self._exchange = ShardedServerExchange(bucket, config.compressor, server, context)

    def buffers(self) -> dict[str, FlatBuffer]:
        return {**super().buffers(), "server": self._exchange.error_buffer()}

    def residual(self) -> Optional[Tensor]:
        return torch.cat((self.held.flat, self._exchange.error))

    def owed(self, lr: float) -> Optional[Tensor]:
        owed = super().owed(lr)
        assert owed is not None
        return owed.add_(self._exchange.owed())

    def decay(self, lr: float) -> float:
        decay = super().decay(lr)
        if decay != 1.0:
            self._exchange.error.mul_(decay)
        return decay

    def start(self, step: int, lr: float) -> None:
        begin = time.perf_counter()
        if (handed_back := self._exchange.resettle()) is not None:
            self.held.flat.add_(handed_back)
        self.take_in(lr)
        self._exchange.set_step(step)
        self._exchange.encode(self.held.flat)
        self._exchange.launch()
        self.context.recorder.encode_seconds(time.perf_counter() - begin)

    def next_round(self) -> None:
        self._exchange.next_round()

    def finish(self) -> None:
        self._exchange.wait()
        begin = time.perf_counter()
        self._exchange.subtract_sent(self.held.flat)
        self._exchange.add_aggregate(self.shared.flat, -1.0)
        self.place()
        self.context.recorder.decode_seconds(time.perf_counter() - begin)
