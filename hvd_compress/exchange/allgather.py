"""Payloads that cannot be added: one allgather of bytes per step, decoded in rank order on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors.base import Codec
from hvd_compress.exchange.base import Context, Exchange, require_countable
from hvd_compress.exchange.received import Inspection, corruption, require_length


class AllgatherExchange(Exchange):
    """Payloads that every rank receives from all: each rank sends P-1 times its own.

    All ranks add the same payloads in the same order to the same values, so replicas stay bitwise equal.
    """

    def __init__(self, bucket: Bucket, codec: Codec, context: Context, name: str = "") -> None:
        super().__init__(bucket, context, name)
        self._codec = codec
        require_countable(bucket, "payloads", codec.numel * codec.dtype.itemsize * context.comm.size)
        self._payload = torch.zeros(codec.numel, dtype=codec.dtype, device=bucket.device)
        self._inspection = Inspection(bucket.device)
        self._handle, self._sent = Handle(), 0
        self._payloads: tuple[Tensor, ...] = ()

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._codec.encode(flat, self._payload)

    def launch(self) -> None:
        self._sent = self._payload.numel()
        self._handle = self.context.comm.allgather_async(self._payload, f"{self.name}.gather")

    def wait(self) -> None:
        everything: Tensor = self._handle.wait()
        comm, numel = self.context.comm, self._codec.numel
        require_length(comm, self.name, everything, [numel] * comm.size, self._sent)
        rows = everything.view(comm.size, numel)
        if flaw := self._inspection.flaw_in_rows(self._codec, rows):
            raise corruption(comm, self.name, flaw)
        self._payloads = rows.unbind() if numel else ()

    def subtract_sent(self, residual: Tensor) -> None:
        self._codec.subtract_sent(self._payload, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        share = alpha * self.context.sum_factor / self.context.comm.size
        for payload in self._payloads:
            self._codec.accumulate(payload, target, share)

    def clear(self, flat: Tensor) -> None:
        self._codec.clear(self._payload, flat)
