"""Another exchange for each stage of a warm-up: payload sizes change, so names and buffers do."""

from __future__ import annotations

import copy
from typing import Callable, Optional, Sequence

from torch import Tensor

from hvd_compress.buckets import Bucket, Mirror
from hvd_compress.compressors import Compressor, Warmup
from hvd_compress.exchange.base import Context, Exchange


class StagedExchange(Exchange):
    """The exchange of the stage in force; the one before is let go."""

    def __init__(
        self, bucket: Bucket, compressor: Warmup, context: Context, make: Callable[[Bucket, Compressor], Exchange]
    ) -> None:
        super().__init__(bucket, context)
        self._compressor, self._make = compressor, make
        self._stage: Optional[int] = None
        self._enter(0)

    def _enter(self, step: int) -> None:
        stage = self._compressor.stage(step)
        if stage != self._stage:
            bucket = copy.copy(self.bucket)
            bucket.name = f"{self.bucket.name}.stage{stage}"
            self._stage, self._current = stage, self._make(bucket, self._compressor.at(step))

    def begin(self, step: int) -> None:
        self._enter(step)
        self._current.begin(step)

    def encode(self, flat: Tensor) -> None:
        self._current.encode(flat)

    def launch(self) -> None:
        self._current.launch()

    def answer(self) -> None:
        self._current.answer()

    def receive(self) -> None:
        self._current.receive()

    def keep_back(self, residual: Tensor) -> None:
        self._current.keep_back(residual)

    def deliver(self, target: Tensor, alpha: float) -> None:
        self._current.deliver(target, alpha)

    def scatter(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        self._current.scatter(tensors, scale)

    def clear(self, flat: Tensor) -> None:
        self._current.clear(flat)

    def memory(self) -> dict[str, Mirror]:
        return self._current.memory()
