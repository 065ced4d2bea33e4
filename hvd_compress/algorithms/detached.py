"""Detached error feedback on updates (Xu & Huang, ICML 2022)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Mapping, Optional, Union

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, Context, UpdateState, require_summable
from hvd_compress.algorithms.folding import Coefficient, Folder, stand
from hvd_compress.buckets import Bucket, Mirror
from hvd_compress.collectives import Average
from hvd_compress.compressors import Compressor
from hvd_compress.exchange import SummedExchange

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
        compressor: what is sent; its payloads must be summable.
        coefficient: the paper's lambda in [0, 1]: 0 is EF-SGD on updates, 1 keeps each rank on its own
            model. "auto" measures the value that minimises the mismatch bound,
            ||mean e||^2 / (||mean e||^2 + variance of e over ranks), on what is exchanged anyway.
        local_steps: steps of the wrapped optimizer per exchange.
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

    def __post_init__(self) -> None:
        require_summable("DEF", self.compressor)
        if isinstance(self.coefficient, str):
            if self.coefficient != "auto":
                raise ValueError(
                    f"DEF: coefficient={self.coefficient!r} is not allowed; it must be a number in [0, 1] or 'auto'"
                )
        else:
            validation.in_range("DEF", "coefficient", self.coefficient, 0.0, 1.0)
            object.__setattr__(self, "coefficient", float(self.coefficient))  # one repr: ranks compare it
        validation.integer("DEF", "local_steps", self.local_steps, 1)
        validation.boolean("DEF", "rescale_residual", self.rescale_residual)

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _DEFState(self, bucket, context)


class _DEFState(UpdateState):
    """x and e flat in float32 (or float64), the parameters themselves flat views holding z."""

    def __init__(self, config: DEF, bucket: Bucket, context: Context) -> None:
        self.bucket, self._config, self._context = bucket, config, context
        self._auto = config.coefficient == "auto"
        self._exchange = SummedExchange(
            bucket, config.compressor, context.link, context.reduction, context.recorder, tail=int(self._auto)
        )
        self.shared = bucket.mirror(bucket.state_dtype)
        self._residual = bucket.mirror(bucket.state_dtype)
        self.local = bucket.mirror(bucket.dtype)
        bucket.adopt(self.local)
        self._folder = Folder(self.shared.flat, self._residual.flat, self.local.flat)
        codec = self._exchange.codec
        if codec.restricts:
            # x, e and z at the coordinates of this step, gathered.
            self._x, self._e = torch.zeros_like(self._exchange.sent), torch.zeros_like(self._exchange.sent)
            self._z = torch.zeros_like(self._exchange.sent, dtype=bucket.dtype)
        self._coefficient: Coefficient = FIRST_COEFFICIENT if self._auto else float(config.coefficient)
        self._placed: Coefficient = 0.0  # the coefficient the parameters stand at now
        self._mean_square: Coefficient = 0.0
        self._square_mean: Coefficient = 0.0
        self._lr = math.nan
        self.anchor()

    def buffers(self) -> dict[str, Mirror]:
        return {"shared": self.shared, "residual": self._residual}

    @property
    def coefficient(self) -> float:
        """The coefficient in force (a host synchronisation where it is measured on an accelerator)."""
        return float(self._coefficient)

    def scalars(self) -> dict[str, Any]:
        return {
            "coefficient": self.coefficient, "placed": float(self._placed), "lr": self._lr,
            "mean_square": float(self._mean_square), "square_mean": float(self._square_mean),
        }

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        self._lr, self._placed = float(saved["lr"]), float(saved.get("placed", float(self._placed)))
        if self._auto:
            self._coefficient = float(saved["coefficient"])
            self._mean_square, self._square_mean = float(saved["mean_square"]), float(saved["square_mean"])

    def residual(self) -> Optional[Tensor]:
        return self._residual.flat

    def anchor(self) -> None:
        self.shared.flat.copy_(self.local.flat)
        self._placed = 0.0

    def place(self) -> None:
        stand(self.shared.flat, self._residual.flat, self._placed, self.local.flat)

    def _gain_and_decay(self, lr: float) -> tuple[float, float]:
        """What an update and the old residual are multiplied with when they meet."""
        # op=Sum means the gradient is the ranks' sum: P times what each of them applied locally.
        gain = 1.0 if self._context.reduction.op == Average else float(self._context.link.size)
        decay = 1.0
        if not self._config.rescale_residual and self._lr > 0 and lr > 0:
            decay = lr / self._lr
        self._lr = lr
        return gain, decay

    def start(self, step: int, lr: float) -> None:
        begin = time.perf_counter()
        gain, decay = self._gain_and_decay(lr)
        exchange, codec = self._exchange, self._exchange.codec
        placed, self._placed = self._placed, self._coefficient
        codec.begin(step)
        if codec.restricts:
            # The coordinates are known beforehand: send them first, work on the rest while they travel.
            codec.encode(self.shared.flat, self._x)
            codec.encode(self._residual.flat, self._e)
            codec.encode(self.local.flat, self._z)
            Folder(self._x, self._e, self._z).fold(placed, self._placed, gain, decay)
            exchange.sent.copy_(self._e)
        else:
            self._folder.fold(placed, self._placed, gain, decay)
            codec.encode(self._residual.flat, exchange.sent)
        if self._auto:
            exchange.tail.copy_(exchange.sent.to(exchange.tail.dtype).square().sum())
        exchange.launch()
        if codec.restricts:
            self._folder.fold(placed, self._placed, gain, decay)
        self._context.recorder.encode_seconds(time.perf_counter() - begin)

    def finish(self) -> None:
        self._exchange.wait()
        begin = time.perf_counter()
        exchange, codec = self._exchange, self._exchange.codec
        size = self._context.link.size
        if self._auto:
            self._measure(size)
        # x = x - mean_k C(p_k): with op=Sum the residuals carry the factor P, so it is the mean as well.
        share = 1.0 if self._context.reduction.op == Average else 1.0 / size
        if codec.restricts:
            self._x.add_(exchange.received, alpha=-share)
            self._e.sub_(exchange.sent)
            stand(self._x, self._e, self._placed, self._z)
            codec.write(self._x, self.shared.flat)
            codec.write(self._e, self._residual.flat)
            codec.write(self._z, self.local.flat)
        else:
            exchange.deliver(self.shared.flat, -share)
            exchange.keep_back(self._residual.flat)
            stand(self.shared.flat, self._residual.flat, self._placed, self.local.flat)
        self._context.recorder.decode_seconds(time.perf_counter() - begin)

    def _measure(self, size: int) -> None:
        """Best lambda = ||mean e||^2 / mean_k ||e_k||^2, as the mean square is that norm plus the variance."""
        square_mean: Coefficient = self._exchange.received.to(self.bucket.state_dtype).square().sum()
        if self._context.reduction.op != Average:
            square_mean = square_mean / (size * size)
        mean_square: Coefficient = self._exchange.tail_mean(size).sum()
        if self.bucket.device.type == "cpu":
            square_mean, mean_square = float(square_mean), float(mean_square)
        self._square_mean = MEMORY * self._square_mean + (1 - MEMORY) * square_mean
        self._mean_square = MEMORY * self._mean_square + (1 - MEMORY) * mean_square
        if isinstance(self._mean_square, Tensor):
            tiny = torch.finfo(self.bucket.state_dtype).tiny
            self._coefficient = (self._square_mean / self._mean_square.clamp(min=tiny)).clamp(max=1.0)
        elif self._mean_square > 0:
            self._coefficient = min(1.0, float(self._square_mean) / self._mean_square)
