"""How payloads travel: one kind of exchange per file, chosen by how a compressor's payloads combine."""

from hvd_compress.buckets import Bucket
from hvd_compress.compressors import Combine, Compressor, Warmup
from hvd_compress.exchange.base import Context, Exchange, Reduction, require_countable
from hvd_compress.exchange.gathered import GatheredExchange
from hvd_compress.exchange.joint import JointExchange
from hvd_compress.exchange.ring import Ring
from hvd_compress.exchange.staged import StagedExchange
from hvd_compress.exchange.summed import SummedExchange
from hvd_compress.exchange.two_way import TwoWayExchange

__all__ = [
    "Context",
    "Exchange",
    "GatheredExchange",
    "JointExchange",
    "Reduction",
    "Ring",
    "StagedExchange",
    "SummedExchange",
    "TwoWayExchange",
    "exchange_for",
    "require_countable",
]


def exchange_for(bucket: Bucket, compressor: Compressor, context: Context, tail: int = 0) -> Exchange:
    """The one-way exchange that the compressor's payloads need; allocates its buffers.

    Args:
        tail: number of scalars to be averaged besides (only where payloads are summed).
    """
    if isinstance(compressor, Warmup):
        return StagedExchange(bucket, compressor, context, lambda b, c: exchange_for(b, c, context))
    if compressor.combine is Combine.SUM:
        return SummedExchange(bucket, compressor, context, tail)
    if compressor.combine is Combine.GATHER:
        return GatheredExchange(bucket, compressor, context)
    return JointExchange(bucket, compressor, context)
