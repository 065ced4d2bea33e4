"""Random-block sparsifier (Xu & Huang 2022, called RBGS there): one contiguous block per tensor and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Compressor, Payload, SummableCodec
from hvd_compress.compressors.counter_rng import draw, tensor_key
from hvd_compress.compressors.index_codec import IndexCodec
from hvd_compress.compressors.layout import Layout
from hvd_compress.compressors.selection import SelectionCodec, check_density_and_seed, sent_count

# From so many tensors on, with blocks shorter than this on average, an index is faster than a view of each block.
MANY, SHORT = 256, 64


@dataclass(frozen=True)
class RandomBlock(Compressor):
    """Sparsifier that sends one contiguous block of each tensor, at a random place that all ranks agree on.

    With ``b = max(1, floor(n * density))`` and ``start`` uniform in [0, n), the coordinates
    ``(start + i) mod n, 0 <= i < b`` are sent, unscaled: each with probability exactly ``b / n``
    (Xu & Huang 2022, section 3). The place is a pure function of (seed, tensor name, step), so no index
    is sent and payloads can be summed by a ring-allreduce.

    Args:
        density: fraction of elements sent, 0 < density <= 1.
        seed: seed of the draw; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    density: float = 1 / 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_density_and_seed(self)

    @property
    def payload_ratio(self) -> float:
        return self.density

    def selection(self, name: str, numel: int, step: int) -> tuple[int, int]:
        """Return (start, length) of the block of tensor ``name`` with ``numel`` elements at ``step``."""
        if numel == 0:
            return 0, 0
        key = np.array([tensor_key(self.seed, name)], dtype=np.uint64)
        return int(draw(key, step)[0] % np.uint64(numel)), sent_count(numel, self.density)

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Return the block's values in the tensor's dtype, in the order of the selection.

        A block that wraps begins with the values at ``start``. A bucket's payload has each tensor's values in memory
        order instead.
        """
        flat = tensor.detach().reshape(-1)
        start, length = self.selection(name, flat.numel(), step)
        head = flat[start : start + length]
        values = torch.cat((head, flat[: length - head.numel()]))
        return Payload(values, tensor.shape, tensor.dtype, {"start": start, "length": length})

    def decode(self, payload: Payload) -> Tensor:
        """Return the block's values at their coordinates, and zeros elsewhere.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape and dtype.
        """
        out = payload.values.new_zeros(payload.shape.numel(), dtype=payload.dtype)
        start, length = payload.context["start"], payload.context["length"]
        n, wanted = out.numel(), sent_count(out.numel(), self.density)
        if length != wanted or not 0 <= start < max(1, n):
            raise ValueError(
                f"RandomBlock: start={start!r} and length={length!r} are not allowed; of {n} elements the block has "
                f"{wanted}, and it starts in [0, {n})"
            )
        validation.payload_size("RandomBlock", payload.values.shape, payload.values.dtype, wanted, payload.dtype)
        head = min(length, out.numel() - start)
        out[start : start + head] = payload.values[:head]
        out[: length - head] = payload.values[head:]
        return out.view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        blocks = _Blocks(self, layout)
        if len(layout.numels) >= MANY and blocks.lengths.sum() < SHORT * len(layout.numels):
            return _ShortBlocksCodec(blocks, layout, dtype, device)
        return _RandomBlockCodec(blocks, layout, dtype)


class _Blocks:
    """The random draw for all tensors of a layout at once, in numpy.

    Attributes:
        numels: number of elements of each tensor.
        lengths: length of each one's block.
    """

    def __init__(self, config: RandomBlock, layout: Layout) -> None:
        self.numels = np.array(layout.numels, dtype=np.int64)
        self.lengths = np.array([sent_count(n, config.density) for n in layout.numels], dtype=np.int64)
        self._keys = np.array([tensor_key(config.seed, name) for name in layout.names], dtype=np.uint64)
        self._modulus = np.maximum(self.numels, 1).astype(np.uint64)

    def starts(self, step: int) -> npt.NDArray[np.int64]:
        """Return where each block of ``step`` begins in its tensor."""
        return (draw(self._keys, step) % self._modulus).astype(np.int64)


class _ShortBlocksCodec(IndexCodec):
    """Codec for many tensors with short blocks: a view of each block would cost more than an index of its elements."""

    def __init__(self, blocks: _Blocks, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layout, blocks.lengths.tolist(), dtype, device)
        self._blocks = blocks
        begins, lengths = np.cumsum(blocks.numels) - blocks.numels, blocks.lengths
        self._begin, self._numel = np.repeat(begins, lengths), np.repeat(blocks.numels, lengths)
        self._place = np.arange(self.numel) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def draw(self, step: int) -> npt.NDArray[np.int64]:
        start = np.repeat(self._blocks.starts(step), self._blocks.lengths)
        found: npt.NDArray[np.int64] = self._begin + (start + self._place) % self._numel
        return found


class _RandomBlockCodec(SelectionCodec):
    """Codec of all blocks of a bucket at once, by views.

    Each tensor is cut into four runs: the end of the block that wraps, a gap, the block, the rest. So one ``split``
    of the flat vector gives every block as views, in memory order and without any index tensor or loop. Runs
    may be empty.
    """

    def __init__(self, blocks: _Blocks, layout: Layout, dtype: torch.dtype) -> None:
        self._blocks = blocks
        self._runs: list[int] = []
        super().__init__(layout, int(blocks.lengths.sum()), dtype)

    def set_step(self, step: int) -> None:
        start, n, b = self._blocks.starts(step), self._blocks.numels, self._blocks.lengths
        wrapped = np.maximum(start + b - n, 0)
        body = b - wrapped
        runs = np.stack((wrapped, start - wrapped, body, n - start - body), axis=1)
        self._runs = runs.ravel().tolist()

    def select(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        blocks: list[Tensor] = []
        for tensor, k in zip(tensors, range(0, len(self._runs), 4)):
            wrapped, gap, body, _ = self._runs[k : k + 4]
            blocks += tensor[:wrapped], tensor[wrapped + gap : wrapped + gap + body]
        return blocks

    def select_flat(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split_with_sizes(flat, self._runs)[::2])

    # The views always fill the payload and their lengths are known; asking for them would take a tenth of the time.

    def slots(self, payload: Tensor, views: list[Tensor]) -> list[Tensor]:
        return list(torch.split_with_sizes(payload, self._runs[::2]))

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        torch.cat(self.select_flat(flat), out=payload)
