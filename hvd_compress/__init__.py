"""Compressed data-parallel training for Horovod: replace ``hvd.DistributedOptimizer``, keep the script."""

from hvd_compress.algorithms import DEF, EF, LIEC, Algorithm, Dense, DistEF, GlobalSketch, GlobalTopK
from hvd_compress.collectives import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from hvd_compress.compressors import *  # noqa: F403
from hvd_compress.optimizer import DistributedOptimizer
from hvd_compress.policy import Policy
from hvd_compress.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "Adasum", "Algorithm", "Average", "Compression", "DEF", "Dense", "DistEF", "DistributedOptimizer", "EF",
    "GlobalSketch", "GlobalTopK", "LIEC", "Policy", "ProcessSet", "Stats", "Sum", "global_process_set",
]
# What compressors/__init__.py makes public: the compressors and their base.
__all__ += [n for n, v in list(globals().items()) if isinstance(v, type) and issubclass(v, Compressor)]  # noqa: F405
