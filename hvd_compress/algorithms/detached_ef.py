"""Detached error feedback on updates (Xu & Huang, ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Union, cast

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import UpdateAlgorithm, nonfinite_policy, payload_limit, require_combining
from hvd_compress.algorithms.model_points import ModelPoints
from hvd_compress.algorithms.residual_update import Coefficient, ResidualUpdate, detached_point
from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import Bucket
from hvd_compress.compressors import Combine, Compressor, Identity, Warmup
from hvd_compress.exchange import AllreduceExchange, Context, Exchange, ExchangeSchedule, FlatAllreduce
from hvd_compress.finite import require_policy

# "auto" starts from the paper's default and averages its measurements over about ten exchanges.
FIRST_COEFFICIENT = 0.3
AVERAGING = 0.9


@dataclass(frozen=True)
class DEF(UpdateAlgorithm):
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
        rescale_residual: True keeps the residual in update units; False lets a change of learning rate
            change it in proportion.
        nonfinite: "propagate", "raise" or "skip": see ``Algorithm``.

    Raises:
        ValueError: if an argument is out of range.
    """

    compressor: Compressor
    coefficient: Union[float, str] = 0.3
    local_steps: int = 1
    rescale_residual: bool = True
    masking: bool = False
    clip_norm: Optional[float] = None
    nonfinite: str = nonfinite_policy()

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
        require_policy("DEF", self.nonfinite)

    @property
    def allreduce_only(self) -> bool:
        return self.compressor.combine is not Combine.GATHER

    def bucket_limit(self, ranks: int) -> float:
        return payload_limit(self.compressor, ranks)

    def make_exchange(self, bucket: Bucket, context: Context) -> ExchangeSchedule:
        return ExchangeSchedule(bucket, self.compressor, context)

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _DEFState(self, bucket, context)


def dense_on_updates(local_steps: int = 1, compressor: Compressor = Identity()) -> DEF:  # noqa: B008 - frozen
    """Return ``Dense(compressor)`` for use among algorithms that exchange updates: they are averaged uncompressed."""
    return DEF(compressor, coefficient=0.0, local_steps=local_steps)


class _DEFState(UpdateState):
    """One-way exchange of updates; the parameters hold z = x - coefficient * e."""

    def __init__(self, config: DEF, bucket: Bucket, context: Context) -> None:
        exchange = config.make_exchange(bucket, context)
        super().__init__(bucket, context, exchange, config.rescale_residual, config.masking)
        self._sent: Optional[_SentCoordinates] = None
        self._fixed = 0.0 if isinstance(config.coefficient, str) else config.coefficient
        self._measured = _BestCoefficient(bucket, context) if config.coefficient == "auto" else None

    @property
    def next_coefficient(self) -> Coefficient:
        return self._fixed if self._measured is None else self._measured.coefficient

    @property
    def coefficient(self) -> float:
        """The coefficient in force (a host synchronisation where it is measured on an accelerator)."""
        return float(self.next_coefficient)

    def start(self, step: int, lr: float) -> None:
        self.set_step(step)
        if (sent := self._sent_coordinates(self.exchange)) is None:
            self.points.accumulate_update(self.next_coefficient, self.rescale_for_lr(lr))
            self.take_out_nonfinite()
            self.exchange.encode(self.points.residual.flat)
            self._launch()
            return
        # Which coordinates are sent is known before the data. So these are updated first, and while they travel, all
        # others: a coordinate that is not sent has its final e and z before the exchange, as its x does not change.
        # ``finish`` corrects the ones that were sent.
        factor = self.rescale_for_lr(lr)
        sent.update(self.next_coefficient, factor)
        self._launch()
        self.points.accumulate_update(self.next_coefficient, factor)
        self.take_out_nonfinite()

    def _launch(self) -> None:
        self.exchange.launch()
        if self._measured is not None:
            self._measured.launch(cast(AllreduceExchange, self.exchange))

    def _sent_coordinates(self, exchange: Exchange) -> Optional[_SentCoordinates]:
        """Return x, e and z at the coordinates that ``exchange`` sends, if these are known before the data."""
        if not isinstance(exchange, AllreduceExchange) or not exchange.codec.data_independent:
            self._sent = None
        elif self._sent is None or self._sent.exchange is not exchange:
            self._sent = _SentCoordinates(self.points, exchange)
        return self._sent

    def finish(self) -> None:
        self.exchange.wait()
        if self._measured is not None:
            self._measured.update(cast(AllreduceExchange, self.exchange))
        if self._sent is None:
            self.apply_aggregate()
        else:
            self._sent.apply_aggregate()
        self.mask_momentum()

    def reset(self) -> None:
        super().reset()
        if self._measured is not None:
            self._measured.reset()

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        return saved if self._measured is None else {**saved, **self._measured.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if self._measured is not None:
            self._measured.load_state_dict(saved)
        super().load_state_dict(saved)


class _SentCoordinates:
    """x, e and z at the coordinates of this step, gathered: they are sent before the others are updated."""

    def __init__(self, points: ModelPoints, exchange: AllreduceExchange) -> None:
        self.exchange, self._points = exchange, points
        self._whole = (points.shared.flat, points.residual.flat, points.local.flat)
        self._x, self._e, self._z = (torch.zeros_like(exchange.payload, dtype=v.dtype) for v in self._whole)
        self._update = ResidualUpdate(self._x, self._e, self._z)

    def update(self, coefficient: Coefficient, factor: float) -> None:
        """Do the step's residual update at these coordinates only; the residual there is the payload."""
        for whole, part in zip(self._whole, (self._x, self._e, self._z)):
            self.exchange.codec.encode(whole, part)
        self._update.apply(self._points.coefficient, coefficient, factor)
        torch.nan_to_num_(self._e, 0.0, 0.0, 0.0)
        self.exchange.payload.copy_(self._e)

    def apply_aggregate(self) -> None:
        """Set x, e and z to their values after the exchange, at these coordinates."""
        self._x.sub_(self.exchange.aggregate)
        self._e.sub_(self.exchange.payload)
        detached_point(self._x, self._e, self._points.coefficient, self._z)
        for whole, part in zip(self._whole, (self._x, self._e, self._z)):
            self.exchange.codec.write(part, whole)


class _BestCoefficient:
    """lambda* = ||mean e||^2 / mean_k ||e_k||^2, measured on the payloads.

    The denominator is ||mean e||^2 plus the variance over ranks. Both are averaged over about ten exchanges.
    """

    def __init__(self, bucket: Bucket, context: Context) -> None:
        self._on_host = bucket.device.type == "cpu"
        self._dtype, self._device = bucket.state_dtype, bucket.device
        square = torch.zeros(1, dtype=bucket.state_dtype, device=bucket.device)
        # Scale factors from 2^16 on are no payload's, so Horovod never fuses this number with one.
        scale = 2.0 ** (16 + bucket.ordinal % 16)
        self._mean_square_now = FlatAllreduce(square, f"{bucket.name}.square", bucket, context, scale=scale)
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        self.coefficient: Coefficient = FIRST_COEFFICIENT
        self._mean_square: Coefficient = 0.0
        self._square_mean: Coefficient = 0.0

    def launch(self, exchange: AllreduceExchange) -> None:
        """Start to average the ranks' ||e_k||^2 at the coordinates that they exchange."""
        self._mean_square_now.buffer.copy_(exchange.payload.to(self._dtype).square().sum())
        self._mean_square_now.launch()

    def update(self, exchange: AllreduceExchange) -> None:
        """Take in this exchange's two numbers; ``exchange`` has its aggregate."""
        self._mean_square_now.wait()
        square_mean: Coefficient = exchange.aggregate.to(self._dtype).square().sum()
        mean_square: Coefficient = self._mean_square_now.buffer.sum()
        if self._on_host:
            square_mean, mean_square = float(square_mean), float(mean_square)
        self._square_mean = AVERAGING * self._square_mean + (1 - AVERAGING) * square_mean
        self._mean_square = AVERAGING * self._mean_square + (1 - AVERAGING) * mean_square
        if isinstance(self._mean_square, Tensor):
            ratio = self._square_mean / self._mean_square.clamp(min=torch.finfo(self._dtype).tiny)
            self.coefficient = torch.where(self._mean_square > 0, ratio.clamp(max=1.0), self.coefficient)
        elif self._mean_square > 0:
            self.coefficient = min(1.0, float(self._square_mean) / self._mean_square)

    def state_dict(self) -> dict[str, float]:
        """Return the three numbers, which are the same on every rank."""
        return {
            "coefficient": float(self.coefficient),
            "mean_square": float(self._mean_square),
            "square_mean": float(self._square_mean),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.coefficient = self._number(saved["coefficient"])
        self._mean_square, self._square_mean = self._number(saved["mean_square"]), self._number(saved["square_mean"])

    def _number(self, value: float) -> Coefficient:
        """Return what ``update`` keeps: on an accelerator a tensor, whose sums round otherwise than Python's."""
        return float(value) if self._on_host else torch.full((), value, dtype=self._dtype, device=self._device)
