"""Payloads that may be added: one ring-allreduce per step."""

from __future__ import annotations

from typing import Sequence, cast

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.compressors.base import Compressor, SummableCodec
from hvd_compress.exchange.base import Context, Exchange, Reduction
from hvd_compress.exchange.flat_allreduce import FlatAllreduce

HALF_RANGE = 2.0**15  # of float16, the other half being for what adding up rounds


class AllreduceExchange(Exchange):
    """Payloads that may be added: one ring-allreduce of fixed size and stable name per step.

    Scalars that ride along (``tail``) are averaged over ranks in float32 or float64: in the same
    collective if the payload's dtype carries them, else in a small one of their own.

    Args:
        tail: number of scalars that ride along.
    """

    def __init__(self, bucket: Bucket, compressor: Compressor, context: Context, tail: int = 0) -> None:
        super().__init__(bucket, context)
        self.codec = cast(SummableCodec, compressor.codec(bucket.layout, bucket.state_dtype, bucket.device))
        rides = tail if self.codec.dtype == bucket.state_dtype else 0
        n = self.codec.numel
        self.sent = torch.zeros(n, dtype=self.codec.dtype, device=bucket.device)
        buffer = torch.zeros(n + rides, dtype=self.codec.dtype, device=bucket.device)
        self.received, self.tail = buffer[:n], buffer[n:]
        if self.codec.dtype.itemsize == 2:
            # ``encode`` keeps sums in range; divided before, small values would vanish with nobody to hold them.
            context = context._replace(reduction=Reduction(context.reduction.op))
        self._rings = [FlatAllreduce(buffer, "sum", bucket, context)]
        if tail and not rides:
            self.tail = torch.zeros(tail, dtype=bucket.state_dtype, device=bucket.device)
            self._rings.append(FlatAllreduce(self.tail, "tail", bucket, context))

    def set_step(self, step: int) -> None:
        self.codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self.codec.encode(flat, self.sent)
        if self.sent.dtype == torch.float16:
            # The ranks' sum must be finite: what is cut off is held back, an infinity would be the model's end.
            limit = HALF_RANGE / self.context.comm.size
            self.sent.clamp_(-limit, limit)

    def launch(self) -> None:
        """Send ``sent`` (kept: it says what this rank has given away) and ``tail``."""
        self.received.copy_(self.sent)
        for ring in self._rings:
            ring.launch()

    def receive(self) -> None:
        """Wait until ``received`` and ``tail`` hold the aggregate over ranks."""
        for ring in self._rings:
            ring.wait()

    def subtract_sent(self, residual: Tensor) -> None:
        self.codec.subtract_sent(self.sent, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self.codec.accumulate(self.received, target, alpha)

    def write_aggregate(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        payload = self.received
        if scale != 1.0:
            # Not in a dtype that would round once more: nothing would keep what is lost there.
            payload = payload.to(self.bucket.state_dtype).mul_(scale)
        self.codec.write_tensors(payload, tensors)

    def clear(self, flat: Tensor) -> None:
        self.codec.clear(self.sent, flat)
