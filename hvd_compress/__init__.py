"""Compressed data-parallel training for Horovod: replace ``hvd.DistributedOptimizer``, keep the script."""

from hvd_compress.algorithms import DEF, EF, Algorithm, Dense
from hvd_compress.collectives import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from hvd_compress.compressors import BlockSign, Cast, Compressor, Identity, RandomBlock, RandomK, TopK
from hvd_compress.optimizer import DistributedOptimizer
from hvd_compress.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "Adasum", "Algorithm", "Average", "BlockSign", "Cast", "Compression", "Compressor", "DEF", "Dense",
    "DistributedOptimizer", "EF", "Identity", "ProcessSet", "RandomBlock", "RandomK", "Stats", "Sum", "TopK",
    "global_process_set",
]
