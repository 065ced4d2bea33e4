"""Count-sketch: a small table to which every coordinate is added, and in which the large ones can be recognised."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors.base import Codec, Combine, Compressor, Payload
from hvd_compress.compressors.counter_rng import tensor_key
from hvd_compress.compressors.layout import Layout
from hvd_compress.compressors.selection import check_density_and_seed
from hvd_compress.compressors.sketch_hash import Rotations
from hvd_compress.native import sketch as native


@dataclass(frozen=True)
class CountSketch(Compressor):
    """Count-sketch (Charikar, Chen, Farach-Colton 2002) of a whole bucket, hashed by block rotation.

    A table of r rows and c columns. Coordinate i is added, with the sign ``s_j(i)``, to column ``h_j(i)`` of
    each row j; its estimate is the median over rows of ``s_j(i) * table[j, h_j(i)]``. The map is linear, so
    tables may be summed. Each row's estimate is unbiased with variance ``<= ||v||^2 / c``.

    The vector is cut into blocks of c elements; element q of block b is hashed to column ``(q + offset[j, b])
    mod c`` with ``sign[j, b]``. Two coordinates never collide within a block, and collide between blocks with
    probability 1/c, as if every coordinate were hashed; but memory is read in order. Offsets and signs are pure
    functions of (seed, names, step, j, b), so only the table is sent.

    The estimates keep too little for error feedback on them to converge. Their largest serve as a choice of
    coordinates that all ranks agree on (``CountSketchCodec.heavy_hitters``).

    Args:
        density: size of the table as a fraction of elements, 0 < density <= 1, unless ``columns`` is given:
            ``c = max(1, floor(n * density / rows))`` for n elements. With density 1, c = n and decoding is exact.
        rows: r >= 1; the median of an odd number is faster and more exact than that of the next even one.
        columns: c for every bucket, whatever its size (but never more than n).
        seed: seed of the draw; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    density: float = 1 / 100
    rows: int = 5
    columns: Optional[int] = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_density_and_seed(self)
        validation.integer("CountSketch", "rows", self.rows, 1)
        if self.columns is not None:
            validation.integer("CountSketch", "columns", self.columns, 1)
            object.__setattr__(self, "columns", int(self.columns))
        object.__setattr__(self, "rows", int(self.rows))

    @property
    def payload_ratio(self) -> float:
        """Return ``density``, or ``rows`` if rows are as long as the vector, or 1 (unknown) if ``columns`` is given."""
        if self.columns is not None:
            return 1.0
        return float(self.rows) if self.density == 1 else self.density

    def width(self, numel: int) -> int:
        """Return the number of columns for a vector of ``numel`` elements; 0 for an empty one."""
        if self.columns is not None:
            return min(self.columns, numel)
        return min(numel, numel if self.density == 1 else max(1, math.floor(numel * self.density / self.rows)))

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Return the tensor's table, row by row: in float32, or float64 for float64 tensors."""
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return replace(super().encode(wide, name, step), dtype=tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Return the estimate of every coordinate.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape and dtype.
        """
        wide = torch.promote_types(payload.dtype, torch.float32)
        return super().decode(replace(payload, dtype=wide)).to(payload.dtype)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> CountSketchCodec:
        return CountSketchCodec(self, layout, dtype, device)


class CountSketchCodec(Codec):
    """Codec with one table for a bucket's whole flat vector; its hash depends on the names of all its tensors.

    Attributes:
        rows: r.
        columns: c; the payload is the table (r, c), row by row.
    """

    combine = Combine.SKETCH

    def __init__(self, config: CountSketch, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.rows, self.columns = config.rows, config.width(layout.total)
        self.numel = self.rows * self.columns
        self._n, self._device = layout.total, device
        self._hash: Optional[Rotations] = None
        self._step, self._drawn_step = 0, -1
        self._estimates: Optional[Tensor] = None
        self._candidates: Optional[tuple[Tensor, Tensor]] = None
        if self._n:
            name = "\0".join(layout.names)
            keys = [tensor_key(config.seed, f"{name}\0row {j}") for j in range(self.rows)]
            self._hash = Rotations(keys, self._n, self.columns, dtype, device)

    def set_step(self, step: int) -> None:
        self._step = step  # the draw itself is made on the device, when it is first needed

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
        """Return the ascending int64 indices of the ``count`` coordinates whose estimates are largest in magnitude.

        They are a pure function of the bits of ``payload``, and so the same on every rank. nan counts as infinite.
        Of equal estimates the lowest indices are taken on the CPU, and those that ``torch.topk`` takes elsewhere.

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
            if self._candidates is None or self._candidates[1].numel() != capacity:
                self._candidates = (
                    torch.empty(capacity, dtype=torch.int64, device="cpu"),
                    torch.empty(capacity, dtype=torch.int32, device="cpu"),
                )
            native.largest(table, rotations.offsets, rotations.signs, self._n, count, *self._candidates)
            return self._candidates[0][:count]
        if self._estimates is None:
            self._estimates = torch.empty(self._n, dtype=self.dtype, device=self._device)
        rotations.estimate(table, self._estimates)
        sizes = self._estimates.abs_().nan_to_num_(nan=math.inf, posinf=math.inf)
        top = torch.topk(sizes, count, sorted=False)
        return _first_of_ties(sizes, top.values) if payload.device.type == "cpu" else top.indices.sort().values

    def _rotations(self) -> Rotations:
        assert self._hash is not None
        if self._drawn_step != self._step:
            self._hash.draw(self._step)
            self._drawn_step = self._step
        return self._hash


def _first_of_ties(sizes: Tensor, largest: Tensor) -> Tensor:
    """Return the ascending indices of the values ``largest`` in ``sizes``; of equal ones the first are taken."""
    least = largest.min()
    above = (sizes > least).nonzero().view(-1)
    equal = (sizes == least).nonzero().view(-1)[: largest.numel() - above.numel()]
    return torch.cat((above, equal)).sort().values
