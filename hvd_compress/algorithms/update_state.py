"""What algorithms that exchange updates have in common: the shared model, what is held back, the own point."""

from __future__ import annotations

import math
from typing import Any, Mapping, Optional

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.residual_update import Coefficient, Folder, stand
from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.compressors.base import pieces
from hvd_compress.exchange import Context


class HeldUpdates(UpdateState):
    """x and e flat in float32 (or float64), the parameters themselves flat views holding z = x - placed * e.

    With op=Sum the gradients have been multiplied by the number of ranks before the wrapped optimizer stepped (see
    ``local_gradients``): what is exchanged here is always averaged.

    Args:
        rescale: keep what is held back in update units; else a change of learning rate changes it in proportion.
    """

    def __init__(self, bucket: Bucket, context: Context, rescale: bool) -> None:
        self.bucket, self.context, self._rescale = bucket, context, rescale
        self.shared = bucket.flat_buffer(bucket.state_dtype)
        self.held = bucket.flat_buffer(bucket.state_dtype)
        self.local = bucket.flat_buffer(bucket.dtype)
        bucket.move_params_to(self.local)
        self.folder = Folder(self.shared.flat, self.held.flat, self.local.flat)
        self.placed: Coefficient = 0.0  # the coefficient the parameters stand at now
        self._lr = math.nan
        self.anchor()

    def buffers(self) -> dict[str, FlatBuffer]:
        found = {"shared": self.shared, "residual": self.held}
        # Local steps since the last exchange are nowhere but in the parameters.
        return {**found, "local": self.local} if self.underway else found

    def scalars(self) -> dict[str, Any]:
        return {"placed": float(self.placed), "lr": self._lr, "underway": self.underway}

    def accepts(self, saved: Mapping[str, Any]) -> bool:
        return {"placed", "lr", "underway"} <= set(saved)  # all that exchange updates hold back the same

    def load_scalars(self, saved: Mapping[str, Any]) -> None:
        self._lr, self.placed, self.underway = float(saved["lr"]), float(saved["placed"]), bool(saved["underway"])

    def take_back(self, index: int, begin: int, values: Tensor) -> None:
        part = self.bucket.part(self.held.flat, index)
        part[begin : begin + values.numel()].add_(values, alpha=self.context.comm.size)

    def residual(self) -> Optional[Tensor]:
        return self.held.flat

    def owed(self, lr: float) -> Optional[Tensor]:
        owed = self.held.flat.clone()
        if self.underway:
            owed.add_(self.stood({}).to(owed.dtype).sub_(self.local.flat))
        return owed

    def anchor(self) -> None:
        self.shared.flat.copy_(self.local.flat)
        self.placed = 0.0

    def stood(self, saved: Mapping[str, Mapping[str, Any]]) -> Tensor:
        point = torch.empty_like(self.local.flat)
        vectors = (pieces(v, self.bucket.layout.numels) for v in (self.shared.flat, self.held.flat, point))
        for name, x, e, z in zip(self.bucket.layout.names, *vectors):
            stand(x, e, float(saved[name]["placed"]) if name in saved else self.placed, z)
        return point

    def place(self) -> None:
        stand(self.shared.flat, self.held.flat, self.placed, self.local.flat)

    def decay(self, lr: float) -> float:
        """What is held back is multiplied with this when an update of learning rate ``lr`` joins it."""
        decay = lr / self._lr if not self._rescale and self._lr > 0 and lr > 0 else 1.0
        self._lr, self.underway = lr, False
        return decay

    def take_in(self, lr: float) -> None:
        """What the wrapped optimizer has subtracted joins what is held back; the parameters go back to x."""
        self.folder.fold(self.placed, 0.0, self.decay(lr))
        self.placed = 0.0
