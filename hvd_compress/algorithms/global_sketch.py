"""gs-SGD: a global count-sketch finds the coordinates, a second round fetches their values."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, limit_for
from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.detached_ef import dense_on_updates
from hvd_compress.algorithms.momentum_masking import FlatMomentum
from hvd_compress.algorithms.update_state import HeldUpdates
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm import mpi_tree as mpi
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import CountSketch
from hvd_compress.compressors.count_sketch import CountSketchCodec
from hvd_compress.exchange import Context, FlatAllreduce, require_countable

EXCHANGES = ("allreduce", "tree", "allgather")


@dataclass(frozen=True)
class GlobalSketch(Algorithm):
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
        candidates: c, how many candidates per applied coordinate have their values fetched.
        masking: clear the local momentum where it was sent ("momentum_buffer" in the optimizer's state, as SGD and
            RMSprop have it; others are left alone).
        clip_norm: clip the norm of the local gradient to this over the square root of the number of ranks
            before it becomes momentum; None: do not.
        dense_vectors: parameters of one dimension (biases, norms) are averaged uncompressed, as is usual.
        rescale_residual: False lets a change of learning rate change v_k in proportion.

    Raises:
        ValueError: if an argument is out of range, or (at construction of the optimizer) if "tree" is asked
            for and the job does not use MPI.
    """

    exchanges_updates: ClassVar[bool] = True

    sketch: CountSketch = field(default_factory=CountSketch)
    exchange: str = "allreduce"
    k: Optional[int] = None
    candidates: int = 4
    masking: bool = True
    clip_norm: Optional[float] = None
    dense_vectors: bool = True
    rescale_residual: bool = True

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

    def choose(self, entry: ParamEntry) -> Algorithm:
        if self.dense_vectors and entry.parameter.dim() <= 1:
            return dense_on_updates()
        return self

    def check(self, comm: Communicator) -> None:
        if self.exchange == "tree":
            mpi.require("GlobalSketch: exchange='tree'", comm)

    @property
    def gathers(self) -> bool:
        return self.exchange != "allreduce"

    def bucket_limit(self, ranks: int) -> float:
        # A table of given columns does not grow with the bucket.
        grows = self.sketch if self.sketch.columns is None else None
        return limit_for(grows, ranks, gathered=self.exchange == "allgather")

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _GlobalSketchState(self, bucket, context)


class _Table:
    """The ranks' sum of a sketch, by one of three ways; the same bits on every rank."""

    def __init__(self, exchange: str, payload: Tensor, bucket: Bucket, context: Context) -> None:
        self.payload, self._context, self._name = payload, context, f"{bucket.name}.sketches"
        self._ring = FlatAllreduce(payload, "sketch", bucket, context) if exchange == "allreduce" else None
        self._tree = mpi.Tree(context.comm) if exchange == "tree" else None
        self._pending: Any = None
        if exchange == "allgather":
            require_countable(bucket, "sketches", payload.numel() * context.comm.size)

    def launch(self) -> None:
        if self._ring is not None:
            self._ring.launch()
        elif self._tree is None:
            self._pending = self._context.comm.allgather_async(self.payload, self._name)

    def wait(self) -> None:
        """Until ``payload`` holds the sum (or a multiple of it: only the order of magnitudes counts)."""
        if self._ring is not None:
            self._ring.wait()
        elif self._tree is not None:
            host = self.payload.to("cpu")
            self._tree.allreduce(host.numpy())
            self.payload.copy_(host)
        elif self._context.comm.size > 1:
            torch.sum(self._pending.wait().view(self._context.comm.size, -1), dim=0, out=self.payload)


class _GlobalSketchState(HeldUpdates):
    """The parameters hold x itself; ``held`` is v."""

    def __init__(self, config: GlobalSketch, bucket: Bucket, context: Context) -> None:
        super().__init__(bucket, context, config.rescale_residual)
        self._codec: CountSketchCodec = config.sketch.codec(bucket.layout, bucket.state_dtype, bucket.device)
        total, columns = bucket.layout.total, self._codec.columns
        exact = columns >= total
        self._k = min(total, config.k if config.k is not None else total if exact else max(1, columns // 2))
        payload = torch.zeros(self._codec.numel, dtype=self._codec.dtype, device=bucket.device)
        self._table = _Table(config.exchange, payload, bucket, context)
        count = min(total, config.candidates * self._k)
        values = torch.zeros(count, dtype=bucket.state_dtype, device=bucket.device)
        self._values = FlatAllreduce(values, "values", bucket, context)
        self._candidates: Union[Tensor, None] = None
        self._momentum = FlatMomentum(bucket, context) if config.masking else None

    def start(self, step: int, lr: float) -> None:
        begin = time.perf_counter()
        self.take_in(lr)
        self._codec.set_step(step)
        self._codec.encode(self.held.flat, self._table.payload)
        self._table.launch()
        self.context.recorder.encode_seconds(time.perf_counter() - begin)

    def next_round(self) -> None:
        begin = time.perf_counter()
        self._table.wait()
        arrived = time.perf_counter()
        values = self._values.buffer
        self._candidates = self._codec.heavy_hitters(self._table.payload, values.numel())
        torch.index_select(self.held.flat, 0, self._candidates, out=values)
        self._values.launch()
        self.context.recorder.wait_seconds(arrived - begin)
        self.context.recorder.encode_seconds(time.perf_counter() - arrived)

    def finish(self) -> None:
        begin = time.perf_counter()
        self._values.wait()
        arrived = time.perf_counter()
        assert self._candidates is not None
        # Sorted, so that ties and the order of work are the same on every rank.
        kept = torch.topk(self._values.buffer.abs(), self._k, sorted=False).indices.sort().values
        chosen, values = self._candidates.index_select(0, kept), self._values.buffer.index_select(0, kept)
        self.shared.flat.index_add_(0, chosen, values, alpha=-1.0)
        self.held.flat.index_fill_(0, chosen, 0.0)
        if self._momentum is not None:
            self._momentum.clear(lambda momentum: momentum.index_fill_(0, chosen, 0.0))
        self.place()
        self.context.recorder.wait_seconds(arrived - begin)
        self.context.recorder.decode_seconds(time.perf_counter() - arrived)
