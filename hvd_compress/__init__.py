"""Compressed data-parallel training for Horovod: replace ``hvd.DistributedOptimizer``, keep the script."""

from typing import TYPE_CHECKING

from hvd_compress import compressors
from hvd_compress.algorithms import DEF, EF, LIEC, Algorithm, Dense, DistEF, GlobalSketch, GlobalTopK
from hvd_compress.algorithms.policy import Policy
from hvd_compress.comm.communicator import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from hvd_compress.optimizer import DistributedOptimizer
from hvd_compress.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "Adasum",
    "Algorithm",
    "Average",
    "Compression",
    "DEF",
    "Dense",
    "DistEF",
    "DistributedOptimizer",
    "EF",
    "GlobalSketch",
    "GlobalTopK",
    "LIEC",
    "Policy",
    "ProcessSet",
    "Stats",
    "Sum",
    "global_process_set",
]
# What compressors/__init__.py makes public. Not by a star at run time: that would also bring the modules
# there, over ours of the same name.
if TYPE_CHECKING:
    from hvd_compress.compressors import *  # noqa: F403

_found = {n: v for n, v in vars(compressors).items() if isinstance(v, type) and issubclass(v, compressors.Compressor)}
globals().update(_found)
__all__ += list(_found)
