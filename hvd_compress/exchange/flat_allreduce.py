"""One buffer summed in place by one allreduce of fixed size and stable name."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Average, Handle
from hvd_compress.exchange.base import Context, Reduction, require_countable


def fusion_breaking_scale(bucket: Bucket, dtype: torch.dtype) -> float:
    """Power of two that Horovod divides a bucket's payload by before it travels and multiplies it with after.

    Horovod fuses what happens to be ready in the same cycle, and where a ring cuts a fused buffer decides in
    which order ranks are added: results would depend on timing. It never fuses collectives with different
    scale factors, and powers of two round nothing (16-bit payloads have no range to spare and are left alone).
    """
    turn = bucket.ordinal % 32
    return 2.0 ** (turn if turn < 16 else 15 - turn) if dtype.itemsize > 2 else 1.0


class FlatAllreduce:
    """A buffer of one bucket that ranks sum or average, the order of summation not depending on timing.

    Args:
        buffer: what is reduced, in place.
        name: what the collective is called after the bucket's name.
        averages: the mean is wanted, whatever the optimizer's op.
    """

    def __init__(self, buffer: Tensor, name: str, bucket: Bucket, context: Context, averages: bool = False) -> None:
        require_countable(bucket, f"{name} payload", buffer.numel())
        self.buffer, self._name, self._context = buffer, f"{bucket.name}.{name}", context
        reduction = Reduction(Average) if averages else context.reduction
        spread = fusion_breaking_scale(bucket, buffer.dtype)
        self._op = reduction.op
        self._factors = 1.0 / (reduction.predivide * spread), reduction.predivide * spread
        self._pending = Handle(None)

    def launch(self) -> None:
        """Start to reduce the buffer."""
        self._pending = self._context.comm.allreduce_async(self.buffer, self._name, self._op, *self._factors)

    def wait(self) -> None:
        """Until the buffer holds the aggregate."""
        self._pending.wait()
