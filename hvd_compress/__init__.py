"""Compressed data-parallel training for Horovod: replace ``hvd.DistributedOptimizer``, keep the script."""

from hvd_compress import checkpoint as checkpoint
from hvd_compress.algorithms import DEF, EF, LIEC, Algorithm, Dense, DistEF, GlobalSketch, GlobalTopK, Policy
from hvd_compress.comm.communicator import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from hvd_compress.compressors import (
    BlockSign,
    Cast,
    Compressor,
    CountSketch,
    Identity,
    LowRank,
    RandomBlock,
    RandomK,
    TopK,
    Warmup,
)
from hvd_compress.optimizer import DistributedOptimizer, merge_states
from hvd_compress.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "Adasum",
    "Algorithm",
    "Average",
    "BlockSign",
    "Cast",
    "Compression",
    "Compressor",
    "CountSketch",
    "DEF",
    "Dense",
    "DistEF",
    "DistributedOptimizer",
    "EF",
    "GlobalSketch",
    "GlobalTopK",
    "Identity",
    "LIEC",
    "LowRank",
    "Policy",
    "ProcessSet",
    "RandomBlock",
    "RandomK",
    "Stats",
    "Sum",
    "TopK",
    "Warmup",
    "global_process_set",
    "merge_states",
]
