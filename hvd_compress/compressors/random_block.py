"""Random-block sparsifier (Xu & Huang 2022, called RBGS there): one contiguous block per tensor and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Compressor, Layout, Payload, SummableCodec
from hvd_compress.compressors.counter_rng import draw, kept, tensor_key


@dataclass(frozen=True)
class RandomBlock(Compressor):
    """Send one contiguous block of each tensor, at a random place that all ranks agree on.

    With ``b = max(1, floor(n * density))`` and ``start`` uniform in [0, n), the coordinates
    ``(start + i) mod n, 0 <= i < b`` are sent, unscaled: each with probability exactly ``b / n``
    (Xu & Huang 2022, section 3). The place is a pure function of (seed, tensor name, step), so no index
    travels and the payload can be summed by a ring-allreduce.

    Args:
        density: fraction of elements sent, 0 < density <= 1.
        seed: seed of the draw; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    is_sparsifier: ClassVar[bool] = True
    density: float = 1 / 64
    seed: int = 0

    def __post_init__(self) -> None:
        validation.density("RandomBlock", self.density)
        validation.integer("RandomBlock", "seed", self.seed, 0)
        object.__setattr__(self, "density", float(self.density))  # one repr: ranks compare it
        object.__setattr__(self, "seed", int(self.seed))

    @property
    def payload_ratio(self) -> float:
        return self.density

    def selection(self, name: str, numel: int, step: int) -> tuple[int, int]:
        """(start, length) of the block of tensor ``name`` with ``numel`` elements at ``step``; a pure function."""
        length = kept(numel, self.density)
        if numel == 0:
            return 0, 0
        key = np.array([tensor_key(self.seed, name)], dtype=np.uint64)
        return int(draw(key, step)[0] % np.uint64(numel)), length

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """The block's values, in the order of the selection (so a wrapped block starts at ``start``)."""
        flat = tensor.reshape(-1)
        start, length = self.selection(name, flat.numel(), step)
        head = flat[start : start + length]
        values = torch.cat((head, flat[: length - head.numel()]))
        context: dict[str, Any] = {"start": start, "length": length}
        return Payload(values, tensor.shape, tensor.dtype, context)

    def decode(self, payload: Payload) -> Tensor:
        """Zeros, and the block's values in their place."""
        out = payload.values.new_zeros(payload.shape.numel(), dtype=payload.dtype)
        start, length = payload.context["start"], payload.context["length"]
        head = min(length, out.numel() - start)
        out[start : start + head] = payload.values[:head]
        out[: length - head] = payload.values[head:]
        return out.view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> SummableCodec:
        return _RandomBlockCodec(self, layout, dtype)


class _RandomBlockCodec(SummableCodec):
    """All blocks of a bucket at once.

    Each tensor is cut in four runs: the block's wrapped end, a gap, the block, the rest (see ``begin``), so
    one ``split`` of the flat vector gives every block as a view, in memory order and without any index
    tensor or loop. Empty runs are views of no elements.
    """

    data_independent = True

    def __init__(self, config: RandomBlock, layout: Layout, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._n = np.array(layout.numels, dtype=np.int64)
        self._b = np.array([kept(n, config.density) for n in layout.numels], dtype=np.int64)
        self._keys = np.array([tensor_key(config.seed, name) for name in layout.names], dtype=np.uint64)
        self._modulus = np.maximum(self._n, 1).astype(np.uint64)
        self.numel = int(self._b.sum())
        self._runs: list[int] = []

    def set_step(self, step: int) -> None:
        start = (draw(self._keys, step) % self._modulus).astype(np.int64)
        wrapped = np.maximum(start + self._b - self._n, 0)
        body = self._b - wrapped
        runs = np.stack((wrapped, start - wrapped, body, self._n - start - body), axis=1)
        self._runs = runs.ravel().tolist()

    def _blocks(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split_with_sizes(flat, self._runs)[::2])

    def _values(self, payload: Tensor) -> list[Tensor]:
        return list(torch.split_with_sizes(payload, self._runs[::2]))

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        torch.cat(self._blocks(flat), out=payload)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        torch._foreach_add_(self._blocks(flat), self._values(payload), alpha=alpha)

    def subtract_sent(self, payload: Tensor, flat: Tensor) -> None:
        self.clear(payload, flat)  # the same for numbers, and a nan that was sent leaves with the payload

    def write(self, payload: Tensor, flat: Tensor) -> None:
        torch._foreach_copy_(self._blocks(flat), self._values(payload))

    def clear(self, payload: Tensor, flat: Tensor) -> None:
        torch._foreach_zero_(self._blocks(flat))

    def write_tensors(self, payload: Tensor, tensors: Sequence[Tensor]) -> None:
        blocks: list[Tensor] = []
        for tensor, k in zip(tensors, range(0, len(self._runs), 4)):
            wrapped, gap, body, _ = self._runs[k : k + 4]
            blocks += tensor[:wrapped], tensor[wrapped + gap : wrapped + gap + body]
        torch._foreach_copy_(blocks, self._values(payload))
