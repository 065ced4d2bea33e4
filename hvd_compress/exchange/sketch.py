"""Count-sketches that are summed, and then the exact values of the coordinates they find (gs-SGD)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Handle
from hvd_compress.comm.mpi_tree import Tree
from hvd_compress.compressors.count_sketch import CountSketch
from hvd_compress.exchange.base import Context, Exchange, require_countable
from hvd_compress.exchange.flat_allreduce import FlatAllreduce
from hvd_compress.exchange.received import require_length


class _SketchSum:
    """The ranks' sum of a sketch, by an allreduce, a tree of MPI messages or an allgather; the same bits everywhere."""

    def __init__(self, transport: str, table: Tensor, name: str, bucket: Bucket, context: Context) -> None:
        self.table, self._comm, self._name = table, context.comm, f"{name}.sketches"
        self._allreduce: Optional[FlatAllreduce] = None
        self._tree: Optional[Tree] = None
        self._handle, self._sent = Handle(), 0
        if transport == "allreduce":
            self._allreduce = FlatAllreduce(table, f"{name}.sketch", bucket, context)
        elif transport == "tree":
            self._tree = Tree(context.comm)
        else:
            require_countable(bucket, "sketches", table.numel() * context.comm.size)

    def launch(self) -> None:
        """Start to send this rank's table."""
        if self._allreduce is not None:
            self._allreduce.launch()
        elif self._tree is None:
            self._sent = self.table.numel()
            self._handle = self._comm.allgather_async(self.table, self._name)

    def wait(self) -> None:
        """Wait until ``table`` holds the sum, or a multiple of it: only the order of magnitudes is used."""
        if self._allreduce is not None:
            self._allreduce.wait()
        elif self._tree is not None:
            host = self.table.to("cpu")
            self._tree.allreduce(host.numpy())
            self.table.copy_(host)
        elif self._comm.size > 1:
            tables, numel = self._handle.wait(), self.table.numel()
            require_length(self._comm, self._name, tables, [numel] * self._comm.size, self._sent)
            torch.sum(tables.view(self._comm.size, numel), dim=0, out=self.table)


class SketchExchange(Exchange):
    """Two rounds: the ranks' sketches are summed; then the values of the largest estimates are averaged.

    With S the sum of the sketches: candidates = the c*K coordinates of largest |estimate(S)|; values = mean over ranks
    of these coordinates; the K of largest |value| are the aggregate.

    Args:
        sketch: size and seed of the sketch.
        transport: "allreduce", "tree" or "allgather".
        k: K, coordinates of the aggregate; None: half as many as the sketch has columns, all if it is exact.
        candidates: c, candidates per coordinate of the aggregate.
    """

    def __init__(
        self,
        bucket: Bucket,
        sketch: CountSketch,
        context: Context,
        transport: str = "allreduce",
        k: Optional[int] = None,
        candidates: int = 4,
    ) -> None:
        super().__init__(bucket, context)
        self._codec = sketch.codec(bucket.layout, bucket.state_dtype, bucket.device)
        total, columns = bucket.layout.total, self._codec.columns
        if k is None:
            k = total if columns >= total else max(1, columns // 2)
        self._k = min(total, k)
        table = torch.zeros(self._codec.numel, dtype=self._codec.dtype, device=bucket.device)
        self._sum = _SketchSum(transport, table, self.name, bucket, context)
        values = torch.zeros(min(total, candidates * self._k), dtype=bucket.state_dtype, device=bucket.device)
        self._values = FlatAllreduce(values, f"{self.name}.values", bucket, context)
        self._flat: Optional[Tensor] = None
        self._candidates = self._sent = torch.zeros(0, dtype=torch.int64, device=bucket.device)
        self._aggregated = values[:0]

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._flat = flat
        self._codec.encode(flat, self._sum.table)

    def launch(self) -> None:
        self._sum.launch()

    def next_round(self) -> None:
        assert self._flat is not None
        self._sum.wait()
        values = self._values.buffer
        self._candidates = self._codec.heavy_hitters(self._sum.table, values.numel())
        torch.index_select(self._flat, 0, self._candidates, out=values)
        self._values.launch()

    def wait(self) -> None:
        self._values.wait()
        values = self._values.buffer
        # Sorted, so that ties and the order of work are the same on every rank.
        largest = torch.topk(values.abs(), self._k, sorted=False).indices.sort().values
        self._sent, self._aggregated = self._candidates.index_select(0, largest), values.index_select(0, largest)

    def subtract_sent(self, residual: Tensor) -> None:
        self.clear(residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        target.index_add_(0, self._sent, self._aggregated, alpha=alpha)

    def clear(self, flat: Tensor) -> None:
        flat.index_fill_(0, self._sent, 0.0)
