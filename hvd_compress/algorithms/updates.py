"""What algorithms that exchange updates have in common: the shared model, what is held back, the own point."""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional

from torch import Tensor

from hvd_compress.algorithms.base import UpdateState
from hvd_compress.algorithms.folding import Coefficient, Folder, stand
from hvd_compress.buckets import Bucket, Mirror
from hvd_compress.exchange import Context


class HeldUpdates(UpdateState):
    """x and e flat in float32 (or float64), the parameters themselves flat views holding z = x - placed * e.

    Args:
        rescale: keep what is held back in update units; else a change of learning rate changes it in proportion.
    """

    def __init__(self, bucket: Bucket, context: Context, rescale: bool) -> None:
        self.bucket, self.context, self._rescale = bucket, context, rescale
        self.shared = bucket.mirror(bucket.state_dtype)
        self.held = bucket.mirror(bucket.state_dtype)
        self.local = bucket.mirror(bucket.dtype)
        bucket.adopt(self.local)
        self.folder = Folder(self.shared.flat, self.held.flat, self.local.flat)
        self.placed: Coefficient = 0.0  # the coefficient the parameters stand at now
        self._lr = math.nan
        self.anchor()

    def buffers(self) -> dict[str, Mirror]:
        return {"shared": self.shared, "residual": self.held}

    def scalars(self) -> dict[str, Any]:
        return {"placed": float(self.placed), "lr": self._lr}

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        self._lr, self.placed = float(saved["lr"]), float(saved.get("placed", float(self.placed)))

    def residual(self) -> Optional[Tensor]:
        return self.held.flat

    def owed(self, lr: float) -> Optional[Tensor]:
        return self.held.flat.clone()

    def anchor(self) -> None:
        self.shared.flat.copy_(self.local.flat)
        self.placed = 0.0

    def place(self) -> None:
        stand(self.shared.flat, self.held.flat, self.placed, self.local.flat)

    def gain_and_decay(self, lr: float) -> tuple[float, float]:
        """What an update and what is held back are multiplied with when they meet."""
        # op=Sum means the gradient is the ranks' sum: P times what each of them applied locally.
        gain = 1.0 if self.context.averages else float(self.context.link.size)
        decay = 1.0
        if not self._rescale and self._lr > 0 and lr > 0:
            decay = lr / self._lr
        self._lr = lr
        return gain, decay

    @property
    def share(self) -> float:
        """What an aggregate over ranks is multiplied with to give their mean (held back, op=Sum has a factor P)."""
        return 1.0 if self.context.averages else 1.0 / self.context.link.size

    def take_in(self, lr: float) -> None:
        """What the wrapped optimizer has subtracted joins what is held back; the parameters go back to x."""
        gain, decay = self.gain_and_decay(lr)
        self.folder.fold(self.placed, 0.0, gain, decay)
        self.placed = 0.0

