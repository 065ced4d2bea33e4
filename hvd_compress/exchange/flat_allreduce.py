"""One buffer reduced in place by one allreduce of fixed size and stable name."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Average, Handle, Reduction
from hvd_compress.exchange.base import Context, require_countable


def fusion_breaking_scale(bucket: Bucket, dtype: torch.dtype) -> float:
    """Return a power of two that Horovod divides a bucket's payload by before the sum and multiplies it with after.

    Horovod fuses collectives that happen to be ready in the same cycle, and where a fused buffer is cut decides in
    which order ranks are added: results would depend on timing. It never fuses collectives with different
    scale factors, and powers of two round nothing (16-bit payloads have no range to spare and keep factor 1).
    """
    turn = bucket.ordinal % 32
    return 2.0 ** (turn if turn < 16 else 15 - turn) if dtype.itemsize > 2 else 1.0


class FlatAllreduce:
    """A buffer of one bucket that ranks sum or average in an order of summation that does not depend on timing.

    Args:
        buffer: the vector that is reduced in place.
        name: name of the collective.
        bucket: the bucket that the buffer belongs to.
        context: the optimizer's communicator and reduction.
        average: take the mean, whatever the optimizer's op.
        scale: a power of two that no other collective has which may be launched at the same time; by default the
            bucket's ``fusion_breaking_scale``.
    """

    def __init__(
        self,
        buffer: Tensor,
        name: str,
        bucket: Bucket,
        context: Context,
        average: bool = False,
        scale: Optional[float] = None,
    ) -> None:
        require_countable(bucket, f"payload {name!r}", buffer.numel())
        self.buffer, self._name, self._comm = buffer, name, context.comm
        reduction = Reduction(Average) if average else context.reduction
        factor = reduction.predivide * (fusion_breaking_scale(bucket, buffer.dtype) if scale is None else scale)
        self._op, self._factors = reduction.op, (1.0 / factor, factor)
        self._handle = Handle()

    def launch(self) -> None:
        """Start to reduce the buffer."""
        self._handle = self._comm.allreduce_async(self.buffer, self._name, self._op, *self._factors)

    def wait(self) -> None:
        """Wait until the buffer holds the aggregate."""
        self._handle.wait()
