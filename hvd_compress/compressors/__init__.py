"""What travels: one idea per file; a new compressor is one file and one line here."""

from hvd_compress.compressors.base import Codec, Compressor, Layout, Payload
from hvd_compress.compressors.random_block import RandomBlock
from hvd_compress.compressors.whole import Cast, Identity

__all__ = ["Cast", "Codec", "Compressor", "Identity", "Layout", "Payload", "RandomBlock"]
