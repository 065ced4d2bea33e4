"""Payloads that cannot be added: one allgather of bytes per step, decoded in rank order on every rank."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors.base import Codec, Compressor
from hvd_compress.exchange.base import Context, Exchange, require_countable


class AllgatherExchange(Exchange):
    """Every rank receives all payloads: each sends P-1 times its own.

    All ranks add the same payloads in the same order to the same values, so replicas stay bitwise equal.
    """

    def __init__(self, bucket: Bucket, compressor: Compressor, context: Context) -> None:
        super().__init__(bucket, context)
        self._codec = cast(Codec, compressor.codec(bucket.layout, bucket.state_dtype, bucket.device))
        require_countable(bucket, "payloads", self._codec.numel * self._codec.dtype.itemsize * context.comm.size)
        self._sent = torch.zeros(self._codec.numel, dtype=self._codec.dtype, device=bucket.device)
        self._pending = Handle(None)
        self._received: tuple[Tensor, ...] = ()

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._codec.encode(flat, self._sent)

    def launch(self) -> None:
        self._pending = self.context.comm.allgather_async(self._sent, f"{self.bucket.name}.gather")

    def receive(self) -> None:
        everything: Tensor = self._pending.wait()
        self._received = torch.split(everything, self._codec.numel) if self._codec.numel else ()

    def subtract_sent(self, residual: Tensor) -> None:
        self._codec.subtract_sent(self._sent, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        share = alpha / self.context.comm.size if self.context.averages else alpha
        for payload in self._received:
            self._codec.accumulate(payload, target, share)

    def clear(self, flat: Tensor) -> None:
        self._codec.clear(self._sent, flat)
