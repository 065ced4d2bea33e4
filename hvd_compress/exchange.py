"""How the payload of one bucket travels and comes back as an aggregate."""

from __future__ import annotations

import time
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from hvd_compress.buckets import Bucket
from hvd_compress.collectives import Average, Link, Pending
from hvd_compress.compressors.base import Compressor
from hvd_compress.telemetry import Recorder


class Reduction(NamedTuple):
    """How ranks are combined, in Horovod's terms.

    Attributes:
        op: Average or Sum.
        predivide: Horovod's ``gradient_predivide_factor``: divide by it before the sum, multiply after.
    """

    op: int = Average
    predivide: float = 1.0


def spread_of(bucket: Bucket, dtype: torch.dtype) -> float:
    """Power of two to divide a bucket's payload by before it travels, and to multiply it with by Horovod after.

    Horovod fuses what happens to be ready in the same cycle, and where a ring cuts a fused buffer decides in
    which order ranks are added: results would depend on timing. It never fuses collectives with different
    scale factors, and powers of two round nothing (16-bit payloads have no range to spare and are left alone).
    """
    return 2.0 ** (bucket.ordinal % 16) if dtype.itemsize > 2 else 1.0


class SummedExchange:
    """Payloads that may be added: one ring-allreduce of fixed size and stable name per step.

    Scalars that ride along (``tail``) are averaged over ranks in float32 or float64: in the same
    collective if the payload's dtype carries them, else in a small one of their own.

    Args:
        tail: number of scalars that ride along.
    """

    def __init__(
        self, bucket: Bucket, compressor: Compressor, link: Link, reduction: Reduction, recorder: Recorder,
        tail: int = 0,
    ) -> None:
        self.codec = compressor.codec(bucket.layout, bucket.state_dtype, bucket.device)
        self._link, self._reduction, self._recorder = link, reduction, recorder
        self._name = f"{bucket.name}.sum"
        rides = tail if self.codec.dtype == bucket.state_dtype else 0
        n = self.codec.numel
        buffer = torch.zeros(n + rides, dtype=self.codec.dtype, device=bucket.device)
        self._buffer, self.received = buffer, buffer[:n]
        self.sent = torch.zeros(n, dtype=self.codec.dtype, device=bucket.device)
        self._spread = spread_of(bucket, self.codec.dtype)
        self._own_tail = tail and not rides
        self.tail = torch.zeros(tail, dtype=bucket.state_dtype, device=bucket.device) if self._own_tail else buffer[n:]
        self._pending: list[Pending] = []

    def launch(self) -> None:
        """Send ``sent`` (kept: it says what this rank has given away) and ``tail``."""
        self.received.copy_(self.sent)
        if self._spread != 1.0:
            self._buffer.mul_(1.0 / self._spread)
        op, predivide = self._reduction
        self._pending = [
            self._link.allreduce_async(self._buffer, self._name, op, 1.0 / predivide, predivide * self._spread)
        ]
        if self._own_tail:
            self._pending.append(self._link.allreduce_async(self.tail, f"{self._name}.tail", op))

    def wait(self) -> None:
        """Wait until ``received`` and ``tail`` hold the aggregate over ranks.

        Raises:
            HorovodInternalError: if a peer has failed; ``sent`` is then untouched and nothing is lost.
        """
        begin = time.perf_counter()
        pending, self._pending = self._pending, []
        for collective in pending:
            collective.wait()
        self._recorder.wait_seconds(time.perf_counter() - begin)

    @property
    def under_way(self) -> bool:
        """True between ``launch`` and ``wait``."""
        return bool(self._pending)

    def tail_mean(self, size: int) -> Tensor:
        """The scalars' mean over ``size`` ranks, whatever the reduction's op."""
        return self.tail if self._reduction.op == Average else self.tail / size

    def keep_back(self, residual: Tensor, alpha: float = 1.0) -> None:
        """``residual -= alpha * decode(sent)``: what was given away is no longer owed."""
        self.codec.accumulate(self.sent, residual, -alpha)

    def deliver(self, target: Tensor, alpha: float) -> None:
        """``target += alpha * decode(received)``."""
        self.codec.accumulate(self.received, target, alpha)

    def scatter(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Write ``scale * decode(received)`` into the exchanged coordinates of a bucket's flattened tensors."""
        if scale != 1.0:
            self.received.mul_(scale)
        self.codec.scatter(self.received, tensors)
