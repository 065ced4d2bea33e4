"""The algorithms, one paper a file: what is remembered between steps, and where the model is."""

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.dense import Dense
from hvd_compress.algorithms.detached_ef import DEF
from hvd_compress.algorithms.dist_ef import DistEF
from hvd_compress.algorithms.error_feedback import EF
from hvd_compress.algorithms.global_sketch import GlobalSketch
from hvd_compress.algorithms.global_topk import GlobalTopK
from hvd_compress.algorithms.liec import LIEC
from hvd_compress.algorithms.policy import Policy

__all__ = ["Algorithm", "DEF", "Dense", "DistEF", "EF", "GlobalSketch", "GlobalTopK", "LIEC", "Policy"]
