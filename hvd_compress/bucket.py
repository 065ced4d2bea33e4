"""Buckets: parameters that are exchanged together, and contiguous flat buffers that mirror them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.compressors.base import Layout, pieces

# Per bucket of gradients: large enough that the latency of a collective does not count, small enough that
# the first buckets travel while backward still computes the others.
BUCKET_BYTES = 32 * 2**20
# A compressed bucket may be larger: below this payload a collective costs its latency, not its bytes.
PAYLOAD_BYTES = 2**20


class ParamEntry(NamedTuple):
    """A parameter as the optimizer knows it: its name and the index of its parameter group."""

    parameter: Parameter
    name: str
    group: int


@dataclass(frozen=True)
class FlatBuffer:
    """A contiguous vector and, for each parameter of a bucket, a view with that parameter's shape.

    Of a vector that is a shard of the bucket, the views are the parts of the parameters that it has, flat, each
    from the element of the parameter that ``begins`` says.
    """

    flat: Tensor
    views: list[Tensor]
    begins: tuple[int, ...] = ()


class Bucket:
    """Parameters of one dtype and device that share one exchange.

    Attributes:
        name: stable name of the bucket's collectives, the same on every rank.
        ordinal: its number among the optimizer's buckets.
        entries: its parameters, names and parameter-group indices.
        dtype: dtype of parameters and gradients.
        state_dtype: dtype of residuals and shared copies: float32, or float64 for float64 parameters.
        device: where they live.
        layout: names, sizes and memory-order shapes along the flat vector.
        group: parameter-group index if all entries agree on it, else -1.
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
        groups = {entry.group for entry in entries}
        self.group = groups.pop() if len(groups) == 1 else -1

    def flat_buffer(self, dtype: torch.dtype, flat: Optional[Tensor] = None) -> FlatBuffer:
        """``flat`` (default: new zeros of ``dtype``), with views shaped and strided like the parameters."""
        if flat is None:
            flat = torch.zeros(self.layout.total, dtype=dtype, device=self.device)
        parts = pieces(flat, self.layout.numels)
        return FlatBuffer(flat, [_like(part, p) for part, p in zip(parts, self.parameters)])

    def part(self, flat: Tensor, index: int) -> Tensor:
        """Parameter ``index`` of a flat vector, in the order of memory."""
        return pieces(flat, self.layout.numels)[index]

    def move_params_to(self, mirror: FlatBuffer) -> None:
        """Move the parameters' storage into ``mirror`` (same dtype), keeping their values.

        Raises:
            ValueError: if parameters share memory, as they would be told apart.
            RuntimeError: if one has another dtype, or is on another device, than the bucket was made for.
        """
        owners: dict[int, str] = {}
        for parameter, name in zip(self.parameters, self.layout.names):
            if (parameter.dtype, parameter.device) != (self.dtype, self.device):
                raise RuntimeError(
                    f"parameter {name!r} is {parameter.dtype} on {parameter.device} now and was {self.dtype} on "
                    f"{self.device} when its exchange was set up; convert the model before the first step, or build "
                    "the optimizer anew"
                )
            if parameter.numel() and (other := owners.setdefault(parameter.data_ptr(), name)) != name:
                raise ValueError(
                    f"parameters {other!r} and {name!r} share memory, which this algorithm, as it moves parameters "
                    "into one vector, would tell apart; tie them as one Parameter (b.weight = a.weight)"
                )
        values = [p.data for p in self.parameters]
        torch._foreach_copy_(mirror.views, values)
        self.point_params_at(mirror)

    def ensure_params_in(self, mirror: FlatBuffer) -> None:
        """``adopt`` again if somebody has given a parameter new storage (``p.data = ...``)."""
        if any(p.data_ptr() != v.data_ptr() for p, v in zip(self.parameters, mirror.views)):
            self.move_params_to(mirror)

    def point_params_at(self, mirror: FlatBuffer) -> None:
        """Make each parameter a view of ``mirror``, whatever its value was."""
        for parameter, view in zip(self.parameters, mirror.views):
            parameter.data = view


def _gapless(parameter: Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor up to the order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    """View of the contiguous ``part`` with the parameter's shape, and its strides if these leave no gaps."""
    # Same strides keep memory formats such as channels_last; elementwise operations run at full speed.
    if _gapless(parameter):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)


def _memory_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape in which a piece of the flat vector is row-major: sizes in the order of ``_like``'s strides.

    Channels-last weights (O, I, H, W) give (O, H, W, I). Dimensions of one element, whose strides mean
    nothing, keep their place only where the parameter is contiguous.
    """
    if parameter.is_contiguous() or not _gapless(parameter):
        return tuple(parameter.shape)
    order = sorted(zip(parameter.stride(), parameter.shape), reverse=True)
    return tuple(size for _, size in order if size > 1)


def build(
    entries: Iterable[ParamEntry],
    *,
    prefix: str,
    split_groups: bool,
    max_bytes: float,
    teams: Sequence[frozenset[int]] = (),
    first: int = 0,
) -> list[Bucket]:
    """Cut ``entries`` into buckets, last parameters first (the order in which backward reaches them).

    Args:
        entries: parameters in the optimizer's order.
        prefix: start of every bucket's name.
        split_groups: give parameter groups buckets of their own (they have learning rates of their own).
        max_bytes: close a bucket when it holds this much; parameters of a team are not cut.
        first: number of the first bucket.
        teams: disjoint sets of parameter ids to be kept together (Horovod's ``groups``).
    """
    team_of = {pid: k for k, team in enumerate(teams) for pid in team}
    open_buckets: dict[tuple[object, ...], list[ParamEntry]] = {}
    filled: dict[tuple[object, ...], float] = {}
    closed: list[list[ParamEntry]] = []
    for entry in reversed(list(entries)):
        p = entry.parameter
        team = team_of.get(id(p), -1)
        key = (team, p.device, p.dtype, entry.group if split_groups else -1)
        if team < 0 and filled.get(key, 0.0) >= max_bytes:
            closed.append(open_buckets.pop(key))
            filled[key] = 0.0
        open_buckets.setdefault(key, []).append(entry)
        filled[key] = filled.get(key, 0.0) + p.numel() * p.element_size()
    closed.extend(open_buckets.values())
    return [Bucket(f"{prefix}{i}", members, i) for i, members in enumerate(closed, first)]
