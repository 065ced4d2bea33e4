"""How payloads travel: one kind of exchange per file, chosen by how a compressor's payloads combine."""

from hvd_compress.bucket import Bucket
from hvd_compress.compressors import Combine, Compressor, Warmup
from hvd_compress.exchange.allgather import AllgatherExchange
from hvd_compress.exchange.allreduce import AllreduceExchange
from hvd_compress.exchange.base import Context, Exchange, Reduction, require_countable
from hvd_compress.exchange.flat_allreduce import FlatAllreduce
from hvd_compress.exchange.multi_round import MultiRoundExchange
from hvd_compress.exchange.schedule import StagedExchange
from hvd_compress.exchange.sharded_server import ShardedServerExchange

__all__ = [
    "Context",
    "Exchange",
    "AllgatherExchange",
    "MultiRoundExchange",
    "Reduction",
    "FlatAllreduce",
    "StagedExchange",
    "AllreduceExchange",
    "ShardedServerExchange",
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
        return AllreduceExchange(bucket, compressor, context, tail)
    if compressor.combine is Combine.GATHER:
        return AllgatherExchange(bucket, compressor, context)
    return MultiRoundExchange(bucket, compressor, context)
