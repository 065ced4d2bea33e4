"""Detached error feedback on updates (Xu & Huang, ICML 2022)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Mapping, Optional, Union, cast

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, require_combining
from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.momentum_masking import FlatMomentum
from hvd_compress.algorithms.residual_update import Coefficient, Folder, stand
from hvd_compress.algorithms.update_state import HeldUpdates
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors import Combine, Compressor, Identity, Warmup
from hvd_compress.exchange import AllreduceExchange, Context, exchange_for

# "auto" starts from the paper's default and averages its measurements over about ten exchanges.
FIRST_COEFFICIENT = 0.3
MEMORY = 0.9


@dataclass(frozen=True)
class DEF(Algorithm):
    """Detached error feedback: the gradient is taken between the shared model and this rank's own.

    What is compressed is the local update u_k (learning rate, momentum and weight decay inside), here
    whatever the wrapped optimizer subtracted from the parameters (Xu & Huang 2022, algorithm 1):

        p_k = e_k + u_k;   x = x - mean_k C(p_k);   e_k = p_k - C(p_k);   z_k = x - coefficient * e_k

    x is the same on every rank to the bit; the parameters hold z_k, at which the next gradient is taken.
    ``optimizer.consensus()`` puts x (or the virtual iterate) into the parameters to evaluate or save.

    Args:
        compressor: what is sent; any but a sketch.
        coefficient: the paper's lambda in [0, 1]: 0 is EF-SGD on updates, 1 keeps each rank on its own
            model. "auto" measures the value that minimises the mismatch bound,
            ||mean e||^2 / (||mean e||^2 + variance of e over ranks), on what is exchanged anyway; this
            needs a compressor whose payloads are summed, so that all ranks exchange the same coordinates.
        local_steps: steps of the wrapped optimizer per exchange.
        masking: clear the local momentum (torch.optim.SGD's) where it was sent, as Deep Gradient Compression
            does; for compressors that select coordinates.
        clip_norm: clip the norm of the local gradient to this over the square root of the number of ranks
            before it becomes momentum, as Deep Gradient Compression does; None: do not.
        rescale_residual: True keeps what is owed in update units; False lets a change of learning rate
            change it in proportion.

    Raises:
        ValueError: if an argument is out of range.
    """

    exchanges_updates: ClassVar[bool] = True

    compressor: Compressor
    coefficient: Union[float, str] = 0.3
    local_steps: int = 1
    rescale_residual: bool = True
    masking: bool = False
    clip_norm: Optional[float] = None

    def __post_init__(self) -> None:
        require_combining("DEF", "compressor", self.compressor, (Combine.SUM, Combine.GATHER, Combine.JOINT))
        if isinstance(self.coefficient, str):
            if self.coefficient != "auto":
                raise ValueError(
                    f"DEF: coefficient={self.coefficient!r} is not allowed; it must be a number in [0, 1] or 'auto'"
                )
            if self.compressor.combine is not Combine.SUM or isinstance(self.compressor, Warmup):
                raise ValueError(
                    f"DEF: coefficient='auto' is not allowed with compressor={self.compressor!r}: it is measured on "
                    "coordinates that all ranks exchange at every step; use one such as RandomBlock, or give a number"
                )
        else:
            validation.in_range("DEF", "coefficient", self.coefficient, 0.0, 1.0)
            object.__setattr__(self, "coefficient", float(self.coefficient))  # one repr: ranks compare it
        validation.integer("DEF", "local_steps", self.local_steps, 1)
        validation.boolean("DEF", "rescale_residual", self.rescale_residual)
        validation.boolean("DEF", "masking", self.masking)
        if self.masking and not self.compressor.is_sparsifier:
            raise ValueError(
                f"DEF: masking=True is not allowed with compressor={self.compressor!r}, which sends something of "
                "every coordinate; use one that selects coordinates, such as TopK or RandomBlock"
            )
        validation.positive_or_none("DEF", "clip_norm", self.clip_norm)

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _DEFState(self, bucket, context)


def dense_on_updates(local_steps: int = 1, compressor: Compressor = Identity()) -> DEF:  # noqa: B008 - frozen
    """Updates averaged uncompressed (or cast): what Dense(compressor) is among algorithms that exchange updates."""
    return DEF(compressor, coefficient=0.0, local_steps=local_steps)


class _DEFState(HeldUpdates):
    """One-way exchange of updates; the parameters hold z = x - coefficient * e."""

    def __init__(self, config: DEF, bucket: Bucket, context: Context) -> None:
        super().__init__(bucket, context, config.rescale_residual)
        self._auto = config.coefficient == "auto"
        self._exchange = exchange_for(bucket, config.compressor, context, tail=int(self._auto))
        self._momentum = FlatMomentum(bucket, context) if config.masking else None
        self._blocks: Optional[_Blocks] = None
        if isinstance(self._exchange, AllreduceExchange) and self._exchange.codec.data_independent:
            self._blocks = _Blocks(self, self._exchange)
        self._coefficient: Coefficient = (
            FIRST_COEFFICIENT if isinstance(config.coefficient, str) else float(config.coefficient)
        )
        self._mean_square: Coefficient = 0.0
        self._square_mean: Coefficient = 0.0

    def buffers(self) -> dict[str, FlatBuffer]:
        return {**super().buffers(), **self._exchange.warm_start()}

    @property
    def coefficient(self) -> float:
        """The coefficient in force (a host synchronisation where it is measured on an accelerator)."""
        return float(self._coefficient)

    def scalars(self) -> dict[str, Any]:
        return {
            **super().scalars(),
            "coefficient": self.coefficient,
            "mean_square": float(self._mean_square),
            "square_mean": float(self._square_mean),
        }

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        super().load_scalars(saved)
        if self._auto and "coefficient" in saved:
            self._coefficient = float(saved["coefficient"])
            self._mean_square, self._square_mean = float(saved["mean_square"]), float(saved["square_mean"])

    def start(self, step: int, lr: float) -> None:
        begin = time.perf_counter()
        exchange, blocks = self._exchange, self._blocks
        move = (self.placed, self._coefficient, self.decay(lr))
        self.placed = self._coefficient
        exchange.set_step(step)
        if blocks is not None:
            # The coordinates are known beforehand: send them first, work on the rest while they travel.
            blocks.fold(*move)
        else:
            self.folder.fold(*move)
            exchange.encode(self.held.flat)
        if self._auto and isinstance(exchange, AllreduceExchange):
            exchange.tail.copy_(exchange.sent.to(exchange.tail.dtype).square().sum())
        exchange.launch()
        if blocks is not None:
            self.folder.fold(*move)
        self.context.recorder.encode_seconds(time.perf_counter() - begin)

    def next_round(self) -> None:
        self._exchange.next_round()

    def finish(self) -> None:
        self._exchange.wait()
        begin = time.perf_counter()
        if self._auto:
            self._measure()
        if self._blocks is not None:
            self._blocks.add_aggregate(self.placed)
        else:
            self._exchange.add_aggregate(self.shared.flat, -1.0)
            self._exchange.subtract_sent(self.held.flat)
            self.place()
        if self._momentum is not None:
            self._momentum.clear(self._exchange.clear)
        self.context.recorder.decode_seconds(time.perf_counter() - begin)

    def _measure(self) -> None:
        """Best lambda = ||mean e||^2 / mean_k ||e_k||^2, as the mean square is that norm plus the variance."""
        exchange = cast(AllreduceExchange, self._exchange)
        mean = exchange.received.to(self.bucket.state_dtype)
        square_mean: Coefficient = mean.square().sum()
        mean_square: Coefficient = exchange.tail.sum()
        if self.bucket.device.type == "cpu":
            square_mean, mean_square = float(square_mean), float(mean_square)
        self._square_mean = MEMORY * self._square_mean + (1 - MEMORY) * square_mean
        self._mean_square = MEMORY * self._mean_square + (1 - MEMORY) * mean_square
        if isinstance(self._mean_square, Tensor):
            tiny = torch.finfo(self.bucket.state_dtype).tiny
            ratio = (self._square_mean / self._mean_square.clamp(min=tiny)).clamp(max=1.0)
            self._coefficient = torch.where(self._mean_square > 0, ratio, self._coefficient)
        elif self._mean_square > 0:
            self._coefficient = min(1.0, float(self._square_mean) / self._mean_square)


class _Blocks:
    """x, e and z at the coordinates of this step, gathered: they can be sent before the rest is worked on."""

    def __init__(self, state: HeldUpdates, exchange: AllreduceExchange) -> None:
        self._exchange, self._state = exchange, state
        self._whole = (state.shared.flat, state.held.flat, state.local.flat)
        self._x, self._e, self._z = (torch.zeros_like(exchange.sent, dtype=v.dtype) for v in self._whole)
        self._folder = Folder(self._x, self._e, self._z)

    def fold(self, placed: Coefficient, coefficient: Coefficient, decay: float) -> None:
        """The step's fold at these coordinates only; what it gives of e is the payload."""
        for whole, block in zip(self._whole, (self._x, self._e, self._z)):
            self._exchange.codec.encode(whole, block)
        self._folder.fold(placed, coefficient, decay)
        self._exchange.sent.copy_(self._e)

    def add_aggregate(self, coefficient: Coefficient) -> None:
        """x, e and z after the exchange, at these coordinates."""
        self._x.sub_(self._exchange.received)
        self._e.sub_(self._exchange.sent)
        stand(self._x, self._e, coefficient, self._z)
        for whole, block in zip(self._whole, (self._x, self._e, self._z)):
            self._exchange.codec.write(block, whole)
