"""Payloads that may be added: one allreduce per step."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Reduction
from hvd_compress.compressors.base import SummableCodec
from hvd_compress.exchange.base import Context, Exchange
from hvd_compress.exchange.flat_allreduce import FlatAllreduce

HALF_RANGE = 2.0**15  # of float16; the other half is left for the rounding of the sum


class AllreduceExchange(Exchange):
    """Payloads that may be added: one allreduce per step, of fixed size and stable name.

    Attributes:
        codec: the compressor bound to the bucket.
        payload: what this rank has sent at this step.
        aggregate: the aggregate of the payloads, after ``wait``.
    """

    def __init__(self, bucket: Bucket, codec: SummableCodec, context: Context, name: str = "") -> None:
        super().__init__(bucket, context, name)
        self.codec = codec
        self.payload = torch.zeros(codec.numel, dtype=codec.dtype, device=bucket.device)
        self.aggregate = torch.zeros_like(self.payload)
        if codec.dtype.itemsize == 2:
            # ``encode`` keeps sums in range; divided before the sum, small values would vanish from every residual.
            context = context._replace(reduction=Reduction(context.reduction.op))
        self._allreduce = FlatAllreduce(self.aggregate, f"{self.name}.sum", bucket, context)

    def set_step(self, step: int) -> None:
        self.codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self.codec.encode(flat, self.payload)
        if self.payload.dtype == torch.float16:
            # The ranks' sum must be finite: what is cut off stays in the residual, an infinity would ruin the model.
            limit = HALF_RANGE / self.context.comm.size
            self.payload.clamp_(-limit, limit)

    def launch(self) -> None:
        self.aggregate.copy_(self.payload)
        self._allreduce.launch()

    def wait(self) -> None:
        self._allreduce.wait()

    def subtract_sent(self, residual: Tensor) -> None:
        self.codec.subtract_sent(self.payload, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self.codec.accumulate(self.aggregate, target, alpha)

    def write_aggregate(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        values = self.aggregate
        if scale != 1.0:
            # In the residual's dtype: in a smaller one the product would be rounded, and no residual keeps that.
            values = values.to(self.bucket.state_dtype).mul_(scale)
        self.codec.write_tensors(values, tensors)

    def clear(self, flat: Tensor) -> None:
        self.codec.clear(self.payload, flat)
