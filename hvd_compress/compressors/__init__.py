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
from hvd_compress.compressors.whole import Cast, Identity

__all__ = [
    "Cast", "Codec", "Combine", "Compressor", "CountSketch", "CountSketchCodec", "Identity", "JointCodec", "Layout",
    "LowRank", "LowRankCodec", "Payload", "RandomBlock", "ShardedCodec", "SummableCodec",
]
