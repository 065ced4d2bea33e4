"""Payloads that ranks make together, in rounds of small allreduces (PowerSGD)."""

from __future__ import annotations

from typing import Optional, cast

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors.base import Compressor, JointCodec
from hvd_compress.exchange.base import Context, Exchange
from hvd_compress.exchange.flat_allreduce import FlatAllreduce


class MultiRoundExchange(Exchange):
    """What is decoded is common to all ranks, and so is what each of them has given away."""

    def __init__(self, bucket: Bucket, compressor: Compressor, context: Context) -> None:
        super().__init__(bucket, context)
        self._codec = cast(JointCodec, compressor.codec(bucket.layout, bucket.state_dtype, bucket.device))
        payloads = [torch.zeros(n, dtype=self._codec.dtype, device=bucket.device) for n in self._codec.numels]
        self._rings = [
            FlatAllreduce(payload, f"round{i}", bucket, context, averages=True) for i, payload in enumerate(payloads)
        ]
        self._flat: Optional[Tensor] = None

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._flat = flat
        self._codec.encode(0, flat, self._rings[0].buffer)

    def launch(self) -> None:
        self._rings[0].launch()

    def next_round(self) -> None:
        assert self._flat is not None
        for index in range(1, len(self._rings)):
            self._take(index - 1)
            self._codec.encode(index, self._flat, self._rings[index].buffer)
            self._rings[index].launch()

    def receive(self) -> None:
        self._take(len(self._rings) - 1)
        self._flat = None

    def _take(self, index: int) -> None:
        self._rings[index].wait()
        self._codec.receive(index, self._rings[index].buffer)

    def subtract_sent(self, residual: Tensor) -> None:
        self._codec.accumulate(residual, -1.0)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self._codec.accumulate(target, alpha if self.context.averages else alpha * self.context.comm.size)

    def warm_start(self) -> dict[str, FlatBuffer]:
        # Views of their own memory: there is no flat vector behind them.
        return {kind: FlatBuffer(self._rings[0].buffer[:0], views) for kind, views in self._codec.warm_start().items()}
