"""A bucket: parameters that are exchanged together, and contiguous flat buffers with views for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.compressors.layout import Layout, pieces


class ParamEntry(NamedTuple):
    """A parameter as the optimizer knows it: its name and the index of its parameter group."""

    parameter: Parameter
    name: str
    group: int


@dataclass(frozen=True)
class FlatBuffer:
    """A contiguous vector and, for each parameter of a bucket, a view with that parameter's shape.

    Where the vector is one rank's shard of the bucket, the views are the parts of the parameters that lie in the shard,
    one-dimensional, each from the element of the parameter that ``begins`` says.
    """

    flat: Tensor
    views: list[Tensor]
    begins: tuple[int, ...] = ()

    def clear(self, without: frozenset[int]) -> None:
        """Set everything to zero but the views with the indices ``without``."""
        if not without:
            self.flat.zero_()
        elif views := [view for i, view in enumerate(self.views) if i not in without]:
            torch._foreach_zero_(views)


class Bucket:
    """Parameters of one dtype and device that share one exchange.

    Attributes:
        name: stable name of the bucket's collectives, the same on every rank.
        ordinal: its number among the optimizer's buckets.
        entries: its parameters, names and parameter-group indices.
        dtype: dtype of parameters and gradients.
        state_dtype: dtype of residuals and shared models: float32, or float64 for float64 parameters.
        device: device of the parameters.
        layout: names, sizes and memory-order shapes along the flat vector.
        place: index of the parameter group of its last parameter, and that parameter's index in it, as they were seen
            last: groups may be reordered.
    """

    def __init__(self, name: str, entries: Sequence[ParamEntry], ordinal: int = 0) -> None:
        self.name, self.ordinal = name, ordinal
        self.entries = list(entries)
        self.parameters = [entry.parameter for entry in entries]
        self.dtype = self.parameters[0].dtype
        self.state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.device = self.parameters[0].device
        self.layout = Layout(
            tuple(e.name for e in entries),
            tuple(p.numel() for p in self.parameters),
            tuple(_memory_shape(p) for p in self.parameters),
        )
        self.place = (entries[-1].group, 0)
        # As they are now: a model may take another memory format later, but all flat vectors have one order.
        self._strides = [(p.shape, p.stride() if _gapless(p) else None) for p in self.parameters]

    def flat_buffer(self, dtype: torch.dtype, flat: Optional[Tensor] = None) -> FlatBuffer:
        """Return ``flat`` (default: new zeros of ``dtype``) with views shaped and strided as the parameters were."""
        if flat is None:
            flat = torch.zeros(self.layout.total, dtype=dtype, device=self.device)
        parts = pieces(flat, self.layout.numels)
        return FlatBuffer(flat, [_view(part, *kind) for part, kind in zip(parts, self._strides)])

    def copy_of_params(self) -> Tensor:
        """Return the parameters as a new flat vector of ``state_dtype``."""
        buffer = self.flat_buffer(self.state_dtype)
        torch._foreach_copy_(buffer.views, [p.data for p in self.parameters])
        return buffer.flat

    def write_params(self, flat: Tensor, without: frozenset[int] = frozenset()) -> None:
        """Copy a flat vector into the parameters, but for those with the indices ``without``."""
        buffer = self.flat_buffer(flat.dtype)
        buffer.flat.copy_(flat)
        pairs = [pair for i, pair in enumerate(zip(self.parameters, buffer.views)) if i not in without]
        if pairs:
            torch._foreach_copy_([p.data for p, _ in pairs], [view for _, view in pairs])

    def move_params_to(self, buffer: FlatBuffer) -> None:
        """Move the parameters' storage into ``buffer`` (same dtype), keeping their values.

        Raises:
            ValueError: if parameters share memory, which this would separate.
            RuntimeError: if a parameter has another dtype or device than the bucket was made for.
        """
        owners: dict[int, str] = {}
        for parameter, name in zip(self.parameters, self.layout.names):
            self.require_unconverted(parameter, name)
            if parameter.numel() and (other := owners.setdefault(parameter.data_ptr(), name)) != name:
                raise ValueError(
                    f"parameters {other!r} and {name!r} share memory, which this algorithm, as it moves parameters "
                    "into one vector, would separate; tie them as one Parameter (b.weight = a.weight)"
                )
        torch._foreach_copy_(buffer.views, [p.data for p in self.parameters])
        self.point_params_at(buffer)

    def require_unconverted(self, parameter: Parameter, name: str) -> None:
        """Raise RuntimeError if a parameter has another dtype or device than the bucket was made for."""
        if parameter.dtype != self.dtype or parameter.device != self.device:
            raise RuntimeError(
                f"parameter {name!r} is {parameter.dtype} on {parameter.device} now and was {self.dtype} on "
                f"{self.device} when its exchange was set up; convert the model before the first step, or build "
                "the optimizer anew"
            )

    def ensure_params_in(self, buffer: FlatBuffer) -> None:
        """Move the parameters into ``buffer`` again if one has been given new storage (``p.data = ...``)."""
        if any(p.data_ptr() != v.data_ptr() for p, v in zip(self.parameters, buffer.views)):
            self.move_params_to(buffer)

    def point_params_at(self, buffer: FlatBuffer) -> None:
        """Make each parameter a view of ``buffer``, whatever its value was."""
        for parameter, view in zip(self.parameters, buffer.views):
            parameter.data = view


def _gapless(parameter: Tensor) -> bool:
    """Return whether the strides are those of a contiguous tensor up to the order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _view(part: Tensor, shape: tuple[int, ...], strides: Optional[tuple[int, ...]]) -> Tensor:
    """Return a view of the contiguous ``part`` with a parameter's shape, and its strides if these leave no gaps."""
    # Equal strides keep memory formats such as channels_last, so that elementwise operations run at full speed.
    return part.view(shape) if strides is None else part.as_strided(shape, strides)


def _memory_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape in which a piece of the flat vector is row-major: sizes in the order of ``_view``'s strides.

    Channels-last weights (O, I, H, W) give (O, H, W, I). Dimensions of one element, whose strides mean
    nothing, keep their place only where the parameter is contiguous.
    """
    if parameter.is_contiguous() or not _gapless(parameter):
        return tuple(parameter.shape)
    order = sorted(zip(parameter.stride(), parameter.shape), reverse=True)
    return tuple(size for _, size in order if size > 1)
