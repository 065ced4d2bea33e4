"""Random-block sparsifier (Xu & Huang 2022, called RBGS there): one contiguous block per tensor and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_compress.compressors.base import Compressor, Payload, SummableCodec
from hvd_compress.compressors.counter_rng import draw, tensor_key
from hvd_compress.compressors.layout import Layout
from hvd_compress.compressors.selection import SelectionCodec, check_density_and_seed, sent_count


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
        """Return the block's values at their coordinates, and zeros elsewhere."""
        out = payload.values.new_zeros(payload.shape.numel(), dtype=payload.dtype)
        start, length = payload.context["start"], payload.context["length"]
        head = min(length, out.numel() - start)
        out[start : start + head] = payload.values[:head]
        out[: length - head] = payload.values[head:]
        return out.view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return _RandomBlockCodec(self, layout, dtype)


class _RandomBlockCodec(SelectionCodec):
    """Codec of all blocks of a bucket at once.

    Each tensor is cut into four runs: the end of the block that wraps, a gap, the block, the rest. So one ``split``
    of the flat vector gives every block as views, in memory order and without any index tensor or loop. Runs
    may be empty.
    """

    def __init__(self, config: RandomBlock, layout: Layout, dtype: torch.dtype) -> None:
        self._n = np.array(layout.numels, dtype=np.int64)
        self._b = np.array([sent_count(n, config.density) for n in layout.numels], dtype=np.int64)
        self._keys = np.array([tensor_key(config.seed, name) for name in layout.names], dtype=np.uint64)
        self._modulus = np.maximum(self._n, 1).astype(np.uint64)
        self._runs: list[int] = []
        super().__init__(layout, int(self._b.sum()), dtype)

    def set_step(self, step: int) -> None:
        start = (draw(self._keys, step) % self._modulus).astype(np.int64)
        wrapped = np.maximum(start + self._b - self._n, 0)
        body = self._b - wrapped
        runs = np.stack((wrapped, start - wrapped, body, self._n - start - body), axis=1)
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
