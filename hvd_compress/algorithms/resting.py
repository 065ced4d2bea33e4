"""Parameters that rest in an exchange of updates: what is held for them is put aside, and waits."""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple

import torch
from torch import Tensor

from hvd_compress.algorithms.model_points import ModelPoints
from hvd_compress.algorithms.residual_update import Coefficient, detached_point
from hvd_compress.bucket import FlatBuffer


class _Kept(NamedTuple):
    """The shared value and this rank's residual of a parameter, and where its own point is."""

    shared: Tensor
    residual: Tensor
    coefficient: Coefficient


class RestingParameters:
    """Frozen parameters of one bucket. While they rest z takes the place of x, and e is zero: no update moves them.

    Args:
        points: x, e and z of the bucket.
    """

    def __init__(self, points: ModelPoints) -> None:
        self._points = points
        self._kept: dict[int, _Kept] = {}

    def __bool__(self) -> bool:
        return bool(self._kept)

    @property
    def coefficients(self) -> dict[int, float]:
        """Coefficients of the own points of parameters that rest, by their places in the bucket."""
        return {i: float(kept.coefficient) for i, kept in self._kept.items()}

    def begin(self, indices: Iterable[int]) -> None:
        """Put parameters to rest where they are."""
        coefficient = self._points.coefficient
        for i in indices:
            x, e, z = self._points.views(i)
            placed = torch.empty_like(z)
            detached_point(x, e, coefficient, placed)
            # What z has moved since it was placed (local steps) is pending as well.
            self._put_aside(i, e + placed.to(e.dtype).sub_(z), coefficient)

    def load(self, coefficients: Mapping[int, float]) -> None:
        """Put parameters to rest whose x, e and z have been loaded, with their own points at these coefficients."""
        for i, coefficient in coefficients.items():
            self._put_aside(i, self._points.views(i)[1].clone(), coefficient)

    def end(self, indices: Iterable[int]) -> None:
        """Take back x and e of parameters, and leave z as it is."""
        for i in indices:
            x, e, _ = self._points.views(i)
            kept = self._kept.pop(i)
            x.copy_(kept.shared)
            e.copy_(kept.residual)

    def _put_aside(self, index: int, pending: Tensor, coefficient: Coefficient) -> None:
        x, e, z = self._points.views(index)
        self._kept[index] = _Kept(x.clone(), pending, coefficient)
        x.copy_(z)
        e.zero_()

    def shared(self) -> FlatBuffer:
        """Return x, with what was put aside in place of the views of parameters that rest."""
        return self._with({i: kept.shared for i, kept in self._kept.items()}, self._points.shared)

    def residual(self) -> FlatBuffer:
        """Return e, with what was put aside in place of the views of parameters that rest."""
        return self._with({i: kept.residual for i, kept in self._kept.items()}, self._points.residual)

    @staticmethod
    def _with(kept: Mapping[int, Tensor], buffer: FlatBuffer) -> FlatBuffer:
        return FlatBuffer(buffer.flat, [kept.get(i, view) for i, view in enumerate(buffer.views)])

    def values(self) -> dict[int, Tensor]:
        """Return copies of the parameters that rest."""
        return {i: self._points.views(i)[2].clone() for i in self._kept}

    def write(self, values: Mapping[int, Tensor]) -> None:
        """Write parameters that rest, after the whole bucket has been written."""
        for i, value in values.items():
            x, _, z = self._points.views(i)
            x.copy_(value)
            z.copy_(value)
