"""Compressors, one idea per file; a new compressor is one file and one line here.

``X as X`` makes a name public, a compressor also as ``hvd_compress.X``.
"""

from hvd_compress.compressors.base import Codec as Codec
from hvd_compress.compressors.base import Combine as Combine
from hvd_compress.compressors.base import Compressor as Compressor
from hvd_compress.compressors.base import JointCodec as JointCodec
from hvd_compress.compressors.base import Payload as Payload
from hvd_compress.compressors.base import ShardedCodec as ShardedCodec
from hvd_compress.compressors.base import SummableCodec as SummableCodec
from hvd_compress.compressors.cast import Cast as Cast
from hvd_compress.compressors.cast import Identity as Identity
from hvd_compress.compressors.count_sketch import CountSketch as CountSketch
from hvd_compress.compressors.layout import Layout as Layout
from hvd_compress.compressors.low_rank import LowRank as LowRank
from hvd_compress.compressors.random_block import RandomBlock as RandomBlock
from hvd_compress.compressors.random_k import RandomK as RandomK
from hvd_compress.compressors.selection import SelectionCodec as SelectionCodec
from hvd_compress.compressors.sign import BlockSign as BlockSign
from hvd_compress.compressors.topk import TopK as TopK
from hvd_compress.compressors.warmup import Warmup as Warmup
