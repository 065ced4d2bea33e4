"""Another exchange for each stage of a warm-up: payload sizes change, so names and buffers do."""

from __future__ import annotations

import copy
from typing import Callable, Optional, Sequence

from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
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

    def set_step(self, step: int) -> None:
        self._enter(step)
        self._current.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._current.encode(flat)

    def launch(self) -> None:
        self._current.launch()

    def next_round(self) -> None:
        self._current.next_round()

    def receive(self) -> None:
        self._current.receive()

    def subtract_sent(self, residual: Tensor) -> None:
        self._current.subtract_sent(residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self._current.add_aggregate(target, alpha)

    def write_aggregate(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        self._current.write_aggregate(tensors, scale)

    def clear(self, flat: Tensor) -> None:
        self._current.clear(flat)

    def warm_start(self) -> dict[str, FlatBuffer]:
        return self._current.warm_start()
