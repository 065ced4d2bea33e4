"""Scaled signs: one bit per element, and per block the mean of its absolute values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Codec, Compressor, Payload, ShardedCodec
from hvd_compress.compressors.layout import Layout, pieces
from hvd_compress.native import signs as native

_I64 = npt.NDArray[np.int64]
# A bool is a byte of 0 or 1, so eight of them are an int64, and the top byte of its product with _GATHER has their
# bits. The product of a byte and _SPREAD is eight copies of the byte; _EACH keeps another bit of each copy.
_GATHER, _SPREAD, _EACH = 0x0102040810204080, 0x0101010101010101, -0x7FBFDFEFF7FBFDFF


@dataclass(frozen=True)
class BlockSign(Compressor):
    """Compressor that sends the sign of every element and one scale per block.

    A block v of n elements becomes ``C(v) = ||v||_1 / n * sign(v)`` with ``sign(v_i) = +1`` if ``v_i >= 0``
    (so also for 0.0 and -0.0) and -1 otherwise (Bernstein et al. 2018; scaled as by Karimireddy et al. 2019,
    "Error feedback fixes SignSGD"). Then

        ``||v - C(v)||_2^2 = (1 - ||v||_1^2 / (n ||v||_2^2)) ||v||_2^2``,

    at most ``(1 - 1/n) ||v||_2^2``, and about ``0.36 ||v||_2^2`` if v is normally distributed. A block of
    zeros is sent as zeros. A single nan or inf makes the scale nan or inf, and so the whole block.

    A tensor of n elements takes ``ceil(n / 8)`` bytes of bits (element i is bit i % 8 of byte i // 8) and then
    one float32 for each block.

    Args:
        block_size: elements per block, >= 1. Each flattened tensor is cut into blocks, of which the last may be
            shorter. None: each tensor is one block.

    Raises:
        ValueError: if ``block_size`` is neither None nor an integer >= 1.
    """

    block_size: Optional[int] = None

    def __post_init__(self) -> None:
        if self.block_size is not None:
            validation.integer("BlockSign", "block_size (elements that share a scale, or None)", self.block_size, 1)
            object.__setattr__(self, "block_size", int(self.block_size))

    @property
    def payload_ratio(self) -> float:
        return 1 / 32 + (1 / self.block_size if self.block_size else 0.0)

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Return the bits, then the bytes of the scales, as torch.uint8, without padding."""
        flat = tensor.detach().reshape(-1).contiguous()
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()
        blocks = self._blocks((flat.numel(),), flat.dtype, flat.device)
        bits, scales = blocks.new_buffers(flat.device)
        blocks.pack(flat, bits, scales)
        return Payload(torch.cat((bits, scales.view(torch.uint8))), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Return ``scale * sign``, computed in float32 (float64 for float64) and rounded to the tensor's dtype.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape.
        """
        wide = torch.promote_types(payload.dtype, torch.float32)
        flat = payload.values.new_zeros(payload.shape.numel(), dtype=wide)
        blocks = self._blocks((flat.numel(),), wide, flat.device)
        found, numel = payload.values, blocks.nbytes + 4 * blocks.count
        validation.payload_size("BlockSign", found.shape, found.dtype, numel, torch.uint8)
        bits, scales = found.tensor_split((blocks.nbytes,))
        # A view in another dtype must be aligned, which a clone is.
        blocks.add(bits, scales.clone().view(torch.float32), flat, 1.0)
        return flat.to(payload.dtype).view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> Codec:
        return _SignCodec(self._blocks(layout.numels, dtype, device))

    def sharded(self, layout: Layout, borders: Sequence[int], dtype: torch.dtype, device: torch.device) -> ShardedCodec:
        """Bind to a bucket in shards; the scale of a block that a border cuts is that of the whole block.

        Raises:
            ValueError: if a border is neither a multiple of 8 nor the end.
        """
        return _ShardedSigns(self._blocks(layout.numels, dtype, device), borders, device)

    def _blocks(self, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> _SignBlocks:
        return _SignBlocks(block_lengths(numels, self.block_size), self.block_size is None, dtype, device)


def block_lengths(numels: Sequence[int], block_size: Optional[int]) -> _I64:
    """Return the int64 lengths of all blocks of tensors with ``numels`` elements, in order."""
    n = np.array([numel for numel in numels if numel], dtype=np.int64)
    if block_size is None:
        return n
    counts = -(-n // block_size)
    lengths = np.full(counts.sum(), block_size, dtype=np.int64)
    lengths[np.cumsum(counts) - 1] = n - (counts - 1) * block_size
    return lengths


class _SignBlocks:
    """Consecutive blocks of a flat vector, which it compresses to signs and scales, and decodes.

    Args:
        lengths: int64, elements of each block.
        whole_tensors: True if blocks are few and long, so that operations on one block at a time are fast.
        dtype: dtype of the flat vector.
        device: device of the flat vector.

    Attributes:
        numel: elements of the flat vector.
        nbytes: bytes of its packed signs.
        count: number of blocks.
    """

    def __init__(self, lengths: _I64, whole_tensors: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths = lengths
        self.ends: _I64 = np.cumsum(lengths, dtype=np.int64)
        self.numel, self.count = int(lengths.sum()), len(lengths)
        self.nbytes = -(-self.numel // 8)
        self._whole_tensors = whole_tensors
        self._lengths = torch.from_numpy(lengths.astype(np.int64)).to(device, non_blocking=True)
        self._dtype, self._device = dtype, device
        self._scratch: Optional[tuple[Tensor, Tensor, Tensor]] = None
        self._block_index: Optional[Tensor] = None

    def cut(self, start: int, stop: int) -> tuple[_SignBlocks, int, int]:
        """Return the blocks of ``flat[start:stop]``, the index of the first of them, and that after the last."""
        if start == stop:
            return _SignBlocks(self.lengths[:0], self._whole_tensors, self._dtype, self._device), 0, 0
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left")) + 1
        ends = np.minimum(self.ends[first:last], stop)
        lengths = np.diff(ends, prepend=start)
        return _SignBlocks(lengths, self._whole_tensors, self._dtype, self._device), first, last

    def new_buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return uninitialised memory for the bits (uint8) and the scales (float32)."""
        bits = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return bits, torch.empty(self.count, dtype=torch.float32, device=device)

    def pack(self, flat: Tensor, bits: Tensor, scales: Tensor) -> None:
        """Write the signs of ``flat`` into ``bits`` and the mean absolute value of each block into ``scales``."""
        if not self.count:
            return
        if native.applies(flat, bits):
            np.divide(native.pack(flat, bits, self.ends), self.lengths, out=scales.numpy(), casting="same_kind")
            return
        signs, words, values = self._scratch_buffers()
        torch.ge(flat, 0, out=signs[: self.numel])
        torch.mul(signs.view(torch.int64), _GATHER, out=words)
        bits.copy_(words.bitwise_right_shift_(56))  # the conversion keeps the low byte
        # The host adds one element after the other, which is too inexact in float32 for millions; devices add in trees.
        host = self._device.type == "cpu"
        if self._whole_tensors:
            parts = list(pieces(flat, self.lengths.tolist()))
            if host:
                norms = [torch.linalg.vector_norm(part, 1, dtype=torch.float64) for part in parts]
            else:
                norms = list(torch._foreach_norm(parts, 1))
            sums = torch.stack(norms)
        else:
            torch.abs(flat, out=values)
            # A check of the lengths would have to wait for the device, so there is none (unsafe=True).
            sums = torch.segment_reduce(values.double() if host else values, "sum", lengths=self._lengths, unsafe=True)
        scales.copy_(sums.div_(self._lengths))

    def add(self, bits: Tensor, scales: Tensor, flat: Tensor, alpha: float) -> None:
        """Add ``alpha * scale * sign`` to ``flat``."""
        if not self.count:
            return
        if native.applies(flat, bits):
            native.add(bits, flat, self.ends, scales.numpy() * np.float32(alpha))
            return
        signs, words, values = self._scratch_buffers()
        words.copy_(bits).mul_(_SPREAD).bitwise_and_(_EACH)
        torch.ne(words.view(torch.uint8), 0, out=signs)
        values.copy_(signs[: self.numel]).mul_(2).sub_(1)
        factors = scales.to(values.dtype) * alpha
        if self._whole_tensors:
            torch._foreach_mul_(list(pieces(values, self.lengths.tolist())), list(factors.unbind()))
        else:
            values.mul_(factors.index_select(0, self._block_of_element()))
        flat.add_(values)

    def subtract(self, bits: Tensor, scales: Tensor, flat: Tensor) -> None:
        """Subtract ``scale * sign`` from ``flat``; blocks whose scale is not finite become zeros.

        Such a block has been sent as inf or nan, which must not remain in the residual.
        """
        self.add(bits, scales, flat, -1.0)
        if self._device.type != "cpu":
            flat.nan_to_num_(0.0, 0.0, 0.0)
            return
        for block in np.flatnonzero(~np.isfinite(scales.numpy())).tolist():
            flat[int(self.ends[block] - self.lengths[block]) : int(self.ends[block])] = 0.0

    def _scratch_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scratch memory: a bool per sign, an int64 per eight signs, a number per element."""
        if self._scratch is None:
            self._scratch = (
                torch.zeros(8 * self.nbytes, dtype=torch.bool, device=self._device),
                torch.empty(self.nbytes, dtype=torch.int64, device=self._device),
                torch.empty(self.numel, dtype=self._dtype, device=self._device),
            )
        return self._scratch

    def _block_of_element(self) -> Tensor:
        """Return the index of the block of each element, int32."""
        if self._block_index is None:
            elements = torch.arange(self.numel, device=self._device)
            self._block_index = torch.searchsorted(self._lengths.cumsum(0), elements, right=True, out_int32=True)
        return self._block_index


class _SignCodec(Codec):
    """Codec of a bucket: its signs, zeros up to a multiple of 4 bytes, the scales, zeros up to a multiple of 8."""

    dtype = torch.uint8

    def __init__(self, blocks: _SignBlocks) -> None:
        self._blocks = blocks
        self._scales_at = -(-blocks.nbytes // 4) * 4
        self._end = self._scales_at + 4 * blocks.count
        self.numel = -(-self._end // 8) * 8

    def _parts(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        return payload[: self._blocks.nbytes], payload[self._scales_at : self._end].view(torch.float32)

    def _pad(self, payload: Tensor) -> None:
        payload[self._blocks.nbytes : self._scales_at].zero_()
        payload[self._end :].zero_()

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        self._pad(payload)
        self._blocks.pack(flat, *self._parts(payload))

    def fill(self, payload: Tensor, bits: Tensor, scales: Tensor) -> None:
        """Write a payload of signs and scales that have already been computed."""
        self._pad(payload)
        payload_bits, payload_scales = self._parts(payload)
        payload_bits.copy_(bits)
        payload_scales.copy_(scales)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        self._blocks.add(*self._parts(payload), flat, alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self._blocks.subtract(*self._parts(payload), flat)


class _ShardedSigns(ShardedCodec):
    """Codec that computes signs and scales once, for the whole vector; each message has those of its shard."""

    def __init__(self, blocks: _SignBlocks, borders: Sequence[int], device: torch.device) -> None:
        if any(border % 8 and border != blocks.numel for border in borders):
            raise ValueError(f"borders={list(borders)!r} are not allowed; they must be multiples of 8 or the end")
        self._whole = blocks
        self._bits, self._scales = blocks.new_buffers(device)
        cuts = [blocks.cut(start, stop) for start, stop in zip(borders, borders[1:])]
        self._shard_codecs = [_SignCodec(part) for part, _, _ in cuts]
        self._slices = [
            (slice(start // 8, start // 8 + part.nbytes), slice(first, last))
            for start, (part, first, last) in zip(borders, cuts)
        ]
        super().__init__(self._shard_codecs, borders)

    def encode(self, flat: Tensor, payloads: Sequence[Tensor]) -> None:
        self._whole.pack(flat, self._bits, self._scales)
        for codec, payload, (bits, scales) in zip(self._shard_codecs, payloads, self._slices):
            codec.fill(payload, self._bits[bits], self._scales[scales])

    def subtract_sent(self, payloads: Sequence[Tensor], flat: Tensor) -> None:
        self._whole.subtract(self._bits, self._scales, flat)  # in one operation, however many shards there are
