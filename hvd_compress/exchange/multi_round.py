"""Payloads that ranks make together, in rounds of small allreduces (PowerSGD)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors.base import JointCodec
from hvd_compress.exchange.base import Context, Exchange
from hvd_compress.exchange.flat_allreduce import FlatAllreduce


class MultiRoundExchange(Exchange):
    """Rounds of allreduces, each of payloads made from the mean of the round before.

    What is decoded in the end is common to all ranks: the mean of what each of them has contributed.
    """

    def __init__(self, bucket: Bucket, codec: JointCodec, context: Context, name: str = "") -> None:
        super().__init__(bucket, context, name)
        self._codec = codec
        payloads = [torch.zeros(numel, dtype=codec.dtype, device=bucket.device) for numel in codec.numels]
        self._rounds = [
            FlatAllreduce(payload, f"{self.name}.round{index}", bucket, context, average=True)
            for index, payload in enumerate(payloads)
        ]
        self._flat: Optional[Tensor] = None

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._flat = flat
        self._codec.encode(0, flat, self._rounds[0].buffer)

    def launch(self) -> None:
        self._rounds[0].launch()

    def next_round(self) -> None:
        assert self._flat is not None
        for index in range(1, len(self._rounds)):
            self._receive(index - 1)
            self._codec.encode(index, self._flat, self._rounds[index].buffer)
            self._rounds[index].launch()

    def wait(self) -> None:
        self._receive(len(self._rounds) - 1)
        self._flat = None

    def _receive(self, index: int) -> None:
        self._rounds[index].wait()
        self._codec.receive(index, self._rounds[index].buffer)

    def subtract_sent(self, residual: Tensor) -> None:
        self._codec.subtract_sent(residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self._codec.accumulate(target, alpha * self.context.sum_factor)

    def commit(self) -> None:
        self._codec.commit()

    def reset(self) -> None:
        self._codec.reset()

    def warm_start(self) -> dict[str, FlatBuffer]:
        # Views with memory of their own: there is no flat vector behind them.
        empty = self._rounds[0].buffer[:0]
        return {kind: FlatBuffer(empty, views) for kind, views in self._codec.warm_start().items()}
