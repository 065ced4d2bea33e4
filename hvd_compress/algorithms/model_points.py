"""The vectors of an algorithm that exchanges updates: the shared model x, the residual e, the rank's own point z."""

from __future__ import annotations

from typing import Sequence, Union

import torch
from torch import Tensor

from hvd_compress.algorithms.residual_update import Coefficient, ResidualUpdate, detached_point
from hvd_compress.bucket import Bucket, FlatBuffer


class ModelPoints:
    """x, e and z = x - coefficient * e of one bucket; the parameters are views of z.

    x and e are flat in float32 (or float64), z in the parameters' dtype.

    Attributes:
        shared: x, the same on every rank to the bit.
        residual: e, what this rank has not sent yet.
        local: z, this rank's own point.
        coefficient: the coefficient at which the parameters were placed.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.shared: FlatBuffer = bucket.flat_buffer(bucket.state_dtype)
        self.residual: FlatBuffer = bucket.flat_buffer(bucket.state_dtype)
        self.local: FlatBuffer = bucket.flat_buffer(bucket.dtype)
        bucket.move_params_to(self.local)
        self._update = ResidualUpdate(self.shared.flat, self.residual.flat, self.local.flat)
        self.coefficient: Coefficient = 0.0
        self.set_shared_from_params()

    def views(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, e and z of one parameter."""
        return self.shared.views[index], self.residual.views[index], self.local.views[index]

    def accumulate_update(self, coefficient: Coefficient, factor: float = 1.0) -> None:
        """Compute ``e = factor * e + u;  z = x - coefficient * e``, where u is what z has moved since it was placed."""
        self._update.apply(self.coefficient, coefficient, factor)
        self.coefficient = coefficient

    def set_shared_from_params(self) -> None:
        """Take the parameters as they are for the shared model."""
        self.shared.flat.copy_(self.local.flat)
        self.coefficient = 0.0

    def expected_local(self) -> Tensor:
        """Return the point (flat, new) at which the parameters were placed."""
        point = torch.empty_like(self.local.flat)
        detached_point(self.shared.flat, self.residual.flat, self.coefficient, point)
        return point

    def write_local_point(self) -> None:
        """Write this rank's own point, as it was last chosen, into the parameters."""
        detached_point(self.shared.flat, self.residual.flat, self.coefficient, self.local.flat)

    def adopt_overwritten(self, alike: Sequence[Union[bool, Tensor]], alone: bool) -> None:
        """Make what all ranks have written alike the shared model's; what else was written stays in the parameters.

        Args:
            alike: for each parameter of the bucket True if all of it was, a mask (flat) of the elements that were, or
                False.
            alone: there is one rank only. Then it may as well have clipped its weights, so the shared
                model moves by as much as the parameters, and the residual stays as it is.
        """
        if not any(mask is not False for mask in alike):
            return
        if alone:
            written = self.local.flat.to(self.shared.flat.dtype, copy=True)
            self.write_local_point()
            self.shared.flat.add_(written - self.local.flat.to(written.dtype))
            self.local.flat.copy_(written)
        elif all(mask is True or not p.numel() for mask, p in zip(alike, self._bucket.parameters)):
            self.set_shared_from_params()
        else:
            # A bucket has one coefficient. So what was overwritten moves to this rank's own point about the new model,
            # which makes no update of it, and the rest keeps what its rank has changed.
            before = self._bucket.flat_buffer(self._bucket.dtype, self.local.flat.clone())
            for mask, x, z in zip(alike, self.shared.views, before.views):
                if mask is not False:
                    _write(x, z, mask)
            self.write_local_point()
            for mask, z, old in zip(alike, self.local.views, before.views):
                if mask is not True:
                    _write(z, old, True if mask is False else ~mask)

    def reset_to(self, point: Tensor) -> None:
        """Make ``point`` (flat) the shared model, and this rank's own."""
        self.shared.flat.copy_(point)
        self.coefficient = 0.0
        self.write_local_point()

    def is_at(self, found: Tensor, own_point: Tensor) -> bool:
        """Return whether every element of ``found`` (flat parameters) is the shared model's or ``own_point``'s.

        Up to rounding: another build or device may round the last bit of a rank's own point differently.
        """
        if not found.numel():
            return True
        slack = 8 * torch.finfo(found.dtype).eps * self.shared.flat.abs().max()
        own, shared = ((found - point).abs() <= slack for point in (own_point, self.shared.flat))
        return bool((own | shared).all())


def _write(target: Tensor, source: Tensor, mask: Union[bool, Tensor]) -> None:
    """Copy ``source`` into ``target`` where ``mask`` (flat, in the order of memory) is true."""
    if isinstance(mask, Tensor):
        mask = mask.as_strided(target.shape, target.stride())
        target.copy_(torch.where(mask, source.to(target.dtype), target))
    elif mask:
        target.copy_(source)
