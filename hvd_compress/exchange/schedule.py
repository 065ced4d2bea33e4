"""The exchange in force at a step: one for each stage of a warm-up, as payload sizes, and so names, change."""

from __future__ import annotations

from typing import Optional

from hvd_compress.bucket import Bucket
from hvd_compress.compressors.base import Codec, Compressor, JointCodec, SummableCodec
from hvd_compress.compressors.warmup import Warmup
from hvd_compress.exchange.allgather import AllgatherExchange
from hvd_compress.exchange.allreduce import AllreduceExchange
from hvd_compress.exchange.base import Context, Exchange
from hvd_compress.exchange.multi_round import MultiRoundExchange


def one_way_exchange(bucket: Bucket, compressor: Compressor, context: Context, name: str = "") -> Exchange:
    """Return the one-way exchange that the compressor's payloads need; allocates its buffers.

    Args:
        name: start of the names of its collectives; by default the bucket's name.
    """
    codec = compressor.codec(bucket.layout, bucket.state_dtype, bucket.device)
    if isinstance(codec, SummableCodec):
        return AllreduceExchange(bucket, codec, context, name)
    if isinstance(codec, JointCodec):
        return MultiRoundExchange(bucket, codec, context, name)
    assert isinstance(codec, Codec)
    return AllgatherExchange(bucket, codec, context, name)


class ExchangeSchedule:
    """The one-way exchanges of a bucket; that of a stage which is over is freed."""

    def __init__(self, bucket: Bucket, compressor: Compressor, context: Context) -> None:
        self._bucket, self._compressor, self._context = bucket, compressor, context
        self._stage: Optional[int] = None
        self._exchange: Optional[Exchange] = None

    def at(self, step: int) -> Exchange:
        """Return the exchange of ``step``: the same object as long as its stage lasts."""
        compressor, name, stage = self._compressor, self._bucket.name, 0
        if isinstance(compressor, Warmup):
            stage, compressor = compressor.stage(step), compressor.at(step)
            name = f"{name}.stage{stage}"
        if self._exchange is None or stage != self._stage:
            self._exchange = None  # frees the buffers of the last stage before the next allocates its own
            self._stage, self._exchange = stage, one_way_exchange(self._bucket, compressor, self._context, name)
        return self._exchange

    def reset(self) -> None:
        """Forget what the exchange in force remembers from step to step."""
        if self._exchange is not None:
            self._exchange.reset()
