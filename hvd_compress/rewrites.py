"""Notices that parameters were written between steps, by a broadcast or by loading a model.

Algorithms that exchange updates keep a shared model besides the parameters. If the parameters have been
overwritten with the same values on every rank, these are the model now. If each rank has changed its own
(clipping weights, say), that is part of its update. Either way all ranks must decide alike, and the root
of a broadcast sees nothing change; so each step a few numbers are averaged over ranks, while backward
runs: whether a rank saw its parameters rewritten, and a digest of them.
"""

from __future__ import annotations

import warnings
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.collectives import Link, Pending, is_elastic

SAMPLES = 256  # per bucket, evenly spread
# A digest of 32 bits as base-16 digits: the mean of a digit's square equals the square of its mean only if
# all ranks have the same digit, and both are exact enough in float32 for thousands of ranks.
DIGITS = 8


class RewriteWatch:
    """Watches the parameters of one optimizer; every method takes its buckets' flat parameters."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._seen: list[Tensor] = []
        self._index: list[Tensor] = []
        self._row: Optional[Tensor] = None
        self._pending: Optional[Pending] = None
        self._fresh = True
        self.complete = True  # no rank was missing when last asked

    def _sample(self, flats: Sequence[Tensor]) -> list[Tensor]:
        if len(self._index) != len(flats):
            self._fresh = True
            self._index = [
                torch.linspace(0, max(f.numel() - 1, 0), min(SAMPLES, f.numel()), dtype=torch.float64, device=f.device)
                .round().to(torch.int64)
                for f in flats
            ]
        return [f.index_select(0, index) for f, index in zip(flats, self._index)]

    def remember(self, flats: Sequence[Tensor]) -> None:
        """The parameters stand where the algorithm has put them."""
        self._seen = self._sample(flats)
        self._fresh = False

    def forget(self) -> None:
        """What was remembered no longer counts: a state was loaded, or a step given up (on all ranks alike)."""
        if self._pending is not None and not is_elastic():  # its name is needed again
            self._pending.wait()
        self._fresh, self._pending, self._row = True, None, None

    def launch(self, flats: Sequence[Tensor]) -> None:
        """Start to compare with the other ranks (collective), unless that has been started."""
        if self._pending is not None or not flats:
            return
        now = self._sample(flats)
        device = flats[0].device
        changed = torch.ones((), device=device)
        if not self._fresh:
            moved = sum(((a != b).sum().to(device) for a, b in zip(now, self._seen)), torch.zeros((), device=device))
            changed = (moved * 2 > sum(a.numel() for a in now)).to(torch.float32)
        digits = torch.cat([_digits(values).to(device) for values in now]).view(len(now), DIGITS).sum(0) % 16
        # A rank that has joined (hvd.join()) takes part with zeros, which shows in the first number.
        here = torch.ones(1, device=device)
        row = torch.cat((here, changed.view(1), digits.to(torch.float32), digits.square().to(torch.float32)))
        self._row = row
        self._pending = self._link.allreduce_async(row, "rewrites")

    def rewritten(self, first: bool = False) -> tuple[bool, bool]:
        """Finish what ``launch`` started (the host reads a row of numbers: the one synchronisation of a step).

        Args:
            first: no step has been taken yet; warn if ranks start from different parameters.

        Returns:
            (whether the parameters of any rank were rewritten, whether they are the same on all ranks).
        """
        if self._pending is None or self._row is None:
            return False, True
        pending, row = self._pending, self._row
        self._pending, self._row = None, None
        pending.wait()
        values = row.tolist()
        self.complete = values[0] > 1 - 0.5 / self._link.size
        means, squares = values[2 : 2 + DIGITS], values[2 + DIGITS :]
        same = all(abs(square - mean * mean) < 0.25 / self._link.size for mean, square in zip(means, squares))
        if first and not same:
            warnings.warn(
                f"hvd_compress: at the first step parameters differ between ranks (this is rank {self._link.rank}); "
                "call hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training",
                stacklevel=7,
            )
        return values[1] > 0.25 / self._link.size, same


def _digits(values: Tensor) -> Tensor:
    """Base-16 digits of a 32-bit digest of the bits of ``values``."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(width).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761
    digest = (bits * weights).sum()
    digest = digest ^ (digest >> 29)
    return torch.stack([(digest >> (4 * k)) & 15 for k in range(DIGITS)])
