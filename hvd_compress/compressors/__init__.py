"""What travels: one idea per file; a new compressor is one file and one line here."""

from hvd_compress.compressors.base import (
    Codec,
    Combine,
    Compressor,
    JointCodec,
    Layout,
    Payload,
    ShardedCodec,
    SummableCodec,
)
from hvd_compress.compressors.count_sketch import CountSketch, CountSketchCodec
from hvd_compress.compressors.low_rank import LowRank, LowRankCodec
from hvd_compress.compressors.random_block import RandomBlock
from hvd_compress.compressors.random_k import RandomK
from hvd_compress.compressors.sign import BlockSign
from hvd_compress.compressors.topk import TopK
from hvd_compress.compressors.warmup import Warmup
from hvd_compress.compressors.whole import Cast, Identity

__all__ = [
    "BlockSign", "Cast", "Codec", "Combine", "Compressor", "CountSketch", "CountSketchCodec", "Identity", "JointCodec",
    "Layout", "LowRank", "LowRankCodec", "Payload", "RandomBlock", "RandomK", "ShardedCodec", "SummableCodec", "TopK",
    "Warmup",
]
