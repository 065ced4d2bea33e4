"""Count-sketch: a small table into which every coordinate is added, and from which large ones can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Codec, Combine, Compressor, Layout, Payload
from hvd_compress.compressors.counter_rng import tensor_key
from hvd_compress.compressors.sketch_hash import Rotations
from hvd_compress.native import sketch as native


@dataclass(frozen=True)
class CountSketch(Compressor):
    """Count-sketch (Charikar, Chen, Farach-Colton 2002) of a whole bucket, hashed by block rotation.

    A table of r rows and c columns. Coordinate i is added, with the sign ``s_j(i)``, to column ``h_j(i)`` of
    each row j; its estimate is the median over rows of ``s_j(i) * table[j, h_j(i)]``. The map is linear, so
    tables may be summed. Each row's estimate is unbiased with variance ``<= ||v||^2 / c``.

    The vector is cut into blocks of c elements; element q of block b is hashed to column ``(q + offset[j, b])
    mod c`` with ``sign[j, b]``. Within a block nothing collides, between blocks two coordinates do with
    probability 1/c, as with a hash of every coordinate; but everything is read as a stream. Offsets and signs
    are pure functions of (seed, names, step, j, b), so nothing but the table travels.

    The estimates keep too little for error feedback on them to converge; their largest are meant as a choice
    of coordinates that all ranks agree on (``CountSketchCodec.heavy_hitters``).

    Args:
        density: size of the table as a fraction of elements, 0 < density <= 1, unless ``columns`` is given:
            ``c = max(1, floor(n * density / rows))`` for n elements. With density 1, c = n and decoding is exact.
        rows: r >= 1; the median of an odd number is cheaper and better than that of the next even one.
        columns: c for every bucket, whatever its size (but never more than n).
        seed: seed of the draw; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    combine = Combine.SKETCH
    density: float = 1 / 100
    rows: int = 5
    columns: Optional[int] = None
    seed: int = 0

    def __post_init__(self) -> None:
        validation.density("CountSketch", self.density)
        validation.integer("CountSketch", "rows", self.rows, 1)
        if self.columns is not None:
            validation.integer("CountSketch", "columns", self.columns, 1)
            object.__setattr__(self, "columns", int(self.columns))
        validation.integer("CountSketch", "seed", self.seed, 0)
        object.__setattr__(self, "density", float(self.density))  # one repr: ranks compare it
        object.__setattr__(self, "rows", int(self.rows))
        object.__setattr__(self, "seed", int(self.seed))

    @property
    def payload_ratio(self) -> float:
        """``density``, or ``rows`` where rows are as long as the vector; 1 if ``columns`` is given: not known."""
        if self.columns is not None:
            return 1.0
        return float(self.rows) if self.density == 1 else self.density

    def width(self, numel: int) -> int:
        """Columns of the table for a vector of ``numel`` elements; 0 for an empty one."""
        if self.columns is not None:
            return min(self.columns, numel)
        return min(numel, numel if self.density == 1 else max(1, math.floor(numel * self.density / self.rows)))

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """The tensor's table, row by row: in float32, or float64 for float64 tensors."""
        flat = tensor.reshape(-1).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        codec = self.codec(Layout((name,), (flat.numel(),)), flat.dtype, flat.device)
        codec.set_step(step)
        values = flat.new_empty(codec.numel)
        codec.encode(flat, values)
        return Payload(values, tensor.shape, tensor.dtype, {"name": name, "step": step})

    def decode(self, payload: Payload) -> Tensor:
        """The estimate of every coordinate."""
        numel, values = payload.shape.numel(), payload.values
        codec = self.codec(Layout((payload.context["name"],), (numel,)), values.dtype, values.device)
        codec.set_step(payload.context["step"])
        out = values.new_empty(numel)
        codec.estimate(values, out)
        return out.to(payload.dtype).view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> CountSketchCodec:
        return CountSketchCodec(self, layout, dtype, device)


class CountSketchCodec(Codec):
    """One table for a bucket's whole flat vector; what is drawn depends on the names of all its tensors.

    Attributes:
        rows: r.
        columns: c; the payload is the table (r, c), row by row.
    """

    def __init__(self, config: CountSketch, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.rows, self.columns = config.rows, config.width(layout.total)
        self.numel = self.rows * self.columns
        self._n, self._device = layout.total, device
        self._map: Optional[Rotations] = None
        self._step, self._drawn = 0, -1
        self._estimates: Optional[Tensor] = None
        self._found: Optional[tuple[Tensor, Tensor]] = None
        if self._n:
            name = "\0".join(layout.names)
            keys = [tensor_key(config.seed, f"{name}\0row {j}") for j in range(self.rows)]
            self._map = Rotations(keys, self._n, self.columns, dtype, device)

    def set_step(self, step: int) -> None:
        self._step = step  # what is drawn is drawn on the device, when it is needed

    def encode(self, flat: Tensor, payload: Tensor) -> None:
        """Overwrite ``payload`` with the table of ``flat``."""
        if self._n:
            self._rotations().sketch(flat, payload.view(self.rows, self.columns))

    def estimate(self, payload: Tensor, out: Tensor) -> None:
        """Overwrite ``out`` (as long as the flat vector) with the median estimate of every coordinate.

        With an even number of rows, the mean of the two in the middle. A coordinate that is nan is estimated
        as nan.
        """
        if self._n:
            self._rotations().estimate(payload.view(self.rows, self.columns), out)

    def accumulate(self, payload: Tensor, flat: Tensor, alpha: float) -> None:
        if self._n:
            self._rotations().estimate(payload.view(self.rows, self.columns), flat, alpha)

    def heavy_hitters(self, payload: Tensor, count: int) -> Tensor:
        """Ascending indices of the ``count`` coordinates whose estimates are largest in magnitude, as int64.

        A pure function of the bits of ``payload`` (and so the same on every rank); nan counts as infinite. Of
        equal estimates the lowest indices are taken on the CPU, and what ``torch.topk`` takes elsewhere.

        Args:
            payload: a table, or the sum of several.
            count: 0 <= count <= elements of the flat vector.

        Returns:
            A vector that the next call overwrites.

        Raises:
            ValueError: if ``count`` is out of range.
        """
        if not 0 <= count <= self._n:
            raise ValueError(f"heavy_hitters: count={count!r} is not allowed; it must be an integer in [0, {self._n}]")
        if not count:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        rotations, table = self._rotations(), payload.view(self.rows, self.columns)
        if native.applies(self.rows, payload):
            capacity = native.candidate_capacity(self._n, count)
            if self._found is None or self._found[1].numel() != capacity:
                self._found = torch.empty(capacity, dtype=torch.int64), torch.empty(capacity, dtype=torch.int32)
            native.largest(table, rotations.offsets, rotations.signs, self._n, count, *self._found)
            return self._found[0][:count]
        if self._estimates is None:
            self._estimates = torch.empty(self._n, dtype=self.dtype, device=self._device)
        rotations.estimate(table, self._estimates)
        sizes = self._estimates.abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        top = torch.topk(sizes, count, sorted=False)
        return _first_of_ties(sizes, top.values) if payload.device.type == "cpu" else top.indices.sort().values

    def _rotations(self) -> Rotations:
        assert self._map is not None
        if self._drawn != self._step:
            self._map.draw(self._step)
            self._drawn = self._step
        return self._map


def _first_of_ties(sizes: Tensor, largest: Tensor) -> Tensor:
    """Ascending indices of the values ``largest`` in ``sizes``; of the least of them the first ones."""
    least = largest.min()
    above = (sizes > least).nonzero().view(-1)
    equal = (sizes == least).nonzero().view(-1)[: largest.numel() - above.numel()]
    return torch.cat((above, equal)).sort().values
