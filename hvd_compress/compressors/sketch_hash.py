"""Hash of a count-sketch by block rotation: compiled loops where they apply, torch's operations elsewhere."""

from __future__ import annotations

from typing import Iterator, Optional

import torch
from torch import Tensor

from hvd_compress.compressors import counter_rng
from hvd_compress.native import sketch as native

# On the CPU a slice takes a microsecond; up to this many take less time than a gather with 8-byte indices.
_MAX_SLICES = 2**12
_CPU_TILE = 2**16  # elements; the estimates of all rows stay in the cache
_DEVICE_TILE = 2**20  # elements; large enough that launching kernels takes no time, small enough for scratch memory


class Rotations:
    """The hash of a count-sketch: every block of a vector is rotated, signed and added to every row of a table.

    Element q of block b (element ``b * columns + q`` of the vector) is hashed to column ``(q + offset[j, b]) mod
    columns`` of row j with ``sign[j, b]``.

    Args:
        keys: seed of each row.
        n: length of the vector, at least 1.
        columns: length of a row and of a block, 1 <= columns <= n.
        dtype: dtype of vector and table.
        device: device of vector and table.

    Attributes:
        offsets: int64 (rows, blocks), of the step that was last given to ``draw``.
        signs: ``dtype`` (rows, blocks), +1 or -1, of the same step.
    """

    def __init__(self, keys: list[int], n: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.rows, self.columns, self._dtype = n, len(keys), columns, dtype
        self.blocks = -(-n // columns)
        self._keys = torch.stack([counter_rng.outputs(key, self.blocks, device) for key in keys])
        self._tile = min(n, _CPU_TILE if device.type == "cpu" else _DEVICE_TILE)
        self._slices = device.type == "cpu" and self.rows * self.blocks <= _MAX_SLICES
        self._scratch: Optional[list[Tensor]] = None
        self._ramp: Optional[Tensor] = None

    def draw(self, step: int) -> None:
        """Draw the offsets and signs of step ``step``; must be called before anything else."""
        bits = counter_rng.draw_on_device(self._keys, step)
        self.offsets, self.signs = counter_rng.uniform_below(bits, self.columns), counter_rng.signs(bits, self._dtype)
        if self._slices:
            self._offset_list: list[list[int]] = self.offsets.tolist()
            self._sign_list: list[list[float]] = self.signs.tolist()

    def sketch(self, flat: Tensor, table: Tensor) -> None:
        """Overwrite ``table`` (rows, columns) with the sketch of ``flat`` (n)."""
        if native.applies(self.rows, flat, table):
            native.sketch(flat, table, self.offsets, self.signs)
            return
        table.zero_()
        if self._slices:
            self._sketch_slices(flat, table)
        else:
            self._sketch_gathering(flat, table)

    def estimate(self, table: Tensor, out: Tensor, alpha: Optional[float] = None) -> None:
        """Write the medians of the rows' estimates into ``out`` (n), or with ``alpha`` add ``alpha`` times them."""
        if native.applies(self.rows, table, out):
            native.estimate(table, self.offsets, self.signs, out, alpha)
            return
        for start, median in self._medians(table):
            part = out[start : start + median.numel()]
            if alpha is None:
                part.copy_(median)
            else:
                part.add_(median, alpha=alpha)

    # -- with torch: sketch ----------------------------------------------------------------------------

    def _sketch_slices(self, flat: Tensor, table: Tensor) -> None:
        """Add the two contiguous runs of each rotated block."""
        for b, block in enumerate(torch.split(flat, self.columns)):
            for row, offsets, signs in zip(table, self._offset_list, self._sign_list):
                head = min(block.numel(), self.columns - offsets[b])
                row[offsets[b] : offsets[b] + head].add_(block[:head], alpha=signs[b])
                row[: block.numel() - head].add_(block[head:], alpha=signs[b])

    def _sketch_gathering(self, flat: Tensor, table: Tensor) -> None:
        """Gather each column's element of each block: unlike scattered additions, these have always the same order."""
        whole, ramp = self.n // self.columns, self._columns(table.device)
        for j, row in enumerate(table):
            for first, last, low, high in self._tiles(whole):
                index = (ramp[low:high] - self.offsets[j, first:last, None]).remainder_(self.columns)
                blocks = flat[first * self.columns : last * self.columns].view(last - first, self.columns)
                row[low:high].add_(blocks.gather(1, index).mul_(self.signs[j, first:last, None]).sum(0))
            rest = flat[whole * self.columns :]
            if not rest.numel():
                continue
            for low in range(0, self.columns, self._tile):
                index = (ramp[low : low + self._tile] - self.offsets[j, whole]).remainder_(self.columns)
                values = rest.gather(0, index.clamp(max=rest.numel() - 1)).mul_(self.signs[j, whole])
                row[low : low + self._tile].add_(values.masked_fill_(index >= rest.numel(), 0.0))

    # -- with torch: estimate --------------------------------------------------------------------------

    def _medians(self, table: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first coordinate, medians of consecutive coordinates) of each tile; the next tile overwrites them."""
        if self._scratch is None:
            longest = max(self._tile // self.columns, 1) * min(self.columns, self._tile)
            self._scratch = [torch.empty(longest, dtype=table.dtype, device=table.device) for _ in range(self.rows + 1)]
        whole = self.n // self.columns
        tiles = [*self._tiles(whole)]
        rest = self.n - whole * self.columns
        tiles += [(whole, whole + 1, q, min(q + self._tile, rest)) for q in range(0, rest, self._tile)]
        for first, last, low, high in tiles:
            shape = (last - first, high - low)
            lines = [line[: shape[0] * shape[1]].view(shape) for line in self._scratch]
            for j in range(self.rows):
                self._row_estimates(table[j], j, (first, last, low, high), lines[j])
            yield first * self.columns + low, _median(lines).view(-1)

    def _row_estimates(self, row: Tensor, j: int, tile: tuple[int, int, int, int], out: Tensor) -> None:
        """Write row j's estimates of the coordinates of a tile into ``out``, one line per block."""
        first, last, low, high = tile
        if not self._slices:
            ramp = self._columns(row.device)[low:high]
            index = (ramp + self.offsets[j, first:last, None]).remainder_(self.columns)
            torch.gather(row.expand(last - first, -1), 1, index, out=out).mul_(self.signs[j, first:last, None])
            return
        for b in range(first, last):
            start, line = (low + self._offset_list[j][b]) % self.columns, out[b - first]
            head = min(high - low, self.columns - start)
            line[:head].copy_(row[start : start + head])
            line[head:].copy_(row[: high - low - head])
            if self._sign_list[j][b] < 0:
                line.neg_()  # calling mul_ with a number takes several times as long

    def _tiles(self, whole: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first block, last, first column, last) of tiles of the whole blocks: part of one block, or several."""
        several, width = max(self._tile // self.columns, 1), min(self.columns, self._tile)
        for first in range(0, whole, several):
            for low in range(0, self.columns, width):
                yield first, min(first + several, whole), low, min(low + width, self.columns)

    def _columns(self, device: torch.device) -> Tensor:
        if self._ramp is None:
            self._ramp = torch.arange(self.columns, device=device)
        return self._ramp


def _median(lines: list[Tensor]) -> Tensor:
    """Return the elementwise median of all ``lines`` but the last; all of them are overwritten.

    Of an even number it is the mean of the middle two. The last line is scratch memory.
    """
    *lines, spare = lines
    # This is an insertion sort by exchanges: torch's median and sort along a dimension take ten times as long.
    for j in range(1, len(lines)):
        for k in range(j, 0, -1):
            torch.minimum(lines[k - 1], lines[k], out=spare)
            torch.maximum(lines[k - 1], lines[k], out=lines[k])
            lines[k - 1], spare = spare, lines[k - 1]
    low, high = lines[(len(lines) - 1) // 2], lines[len(lines) // 2]
    return low if low is high else low.mul_(0.5).add_(high, alpha=0.5)
