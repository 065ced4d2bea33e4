"""The ways in which payloads travel: one kind of exchange per file, chosen by the type of a compressor's codec."""

from hvd_compress.exchange.allgather import AllgatherExchange
from hvd_compress.exchange.allreduce import AllreduceExchange
from hvd_compress.exchange.base import Context, Exchange, require_countable
from hvd_compress.exchange.flat_allreduce import FlatAllreduce
from hvd_compress.exchange.multi_round import MultiRoundExchange
from hvd_compress.exchange.schedule import ExchangeSchedule, one_way_exchange
from hvd_compress.exchange.sharded_server import ShardedServerExchange
from hvd_compress.exchange.sketch import SketchExchange
from hvd_compress.exchange.topk_tree import TopKTreeExchange

__all__ = [
    "AllgatherExchange",
    "AllreduceExchange",
    "Context",
    "Exchange",
    "ExchangeSchedule",
    "FlatAllreduce",
    "MultiRoundExchange",
    "ShardedServerExchange",
    "SketchExchange",
    "TopKTreeExchange",
    "one_way_exchange",
    "require_countable",
]
