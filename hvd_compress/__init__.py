"""Compressed data-parallel training for Horovod: replace ``hvd.DistributedOptimizer``, keep the script."""

from hvd_compress.algorithms import DEF, EF, Algorithm, Dense
from hvd_compress.collectives import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from hvd_compress.compressors import Cast, Compressor, CountSketch, Identity, LowRank, RandomBlock
from hvd_compress.optimizer import DistributedOptimizer
from hvd_compress.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "Adasum", "Algorithm", "Average", "Cast", "Compression", "Compressor", "CountSketch", "DEF", "Dense",
    "DistributedOptimizer", "EF", "Identity", "LowRank", "ProcessSet", "RandomBlock", "Stats", "Sum",
    "global_process_set",
]
