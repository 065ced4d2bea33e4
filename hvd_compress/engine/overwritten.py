"""Parameters that a script has overwritten between steps, for algorithms that keep a shared model besides them.

A parameter that has been overwritten with the same values on every rank (by a broadcast, by loading a model) is the
model's now. If each rank has changed its own (clipping weights, say), that is part of its update. Either way all
ranks must decide alike, and the root of a broadcast sees nothing change; so the number of ranks that saw a parameter
change is summed, for each parameter, with the step's check. Only if there is one, its values are compared over ranks.
"""

from __future__ import annotations

import warnings
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Communicator, Sum
from hvd_compress.compressors.layout import pieces
from hvd_compress.engine.replica_check import digest
from hvd_compress.engine.step_check import BITS, WORDS

SAMPLES = 16  # per parameter, evenly spread: of a small one, every element


class Overwritten:
    """The watch over one optimizer's parameters; methods take this rank's own points, bucket by bucket."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._recorded: list[Tensor] = []
        self._index: list[Tensor] = []

    def record(self, points: Sequence[FlatBuffer]) -> None:
        """Note the parameters as they are: the algorithm has placed them."""
        self._index += [_sample_index(point) for point in points[len(self._index) :]]
        self._recorded = self._sample(points)

    def flags(self, points: Sequence[FlatBuffer]) -> Tensor:
        """Return for each parameter that is not empty 1 if it has changed since ``record``, else 0."""
        now = self._sample(points)
        device = points[0].flat.device if points else torch.device("cpu")
        changed = [(a != b).any(1).to(device, torch.float32) for a, b in zip(now, self._recorded)]
        return torch.cat(changed) if changed else torch.zeros(0, device=device)

    def alike(self, points: Sequence[FlatBuffer], counts: Sequence[float], present: int) -> Optional[list[list[bool]]]:
        """Return which parameters were overwritten with the same values on all ranks (collective if any was).

        Args:
            points: as they were given to ``flags``.
            counts: the sums over ranks of the flags.
            present: number of ranks that take part.

        Returns:
            None if no rank saw a parameter change; else a flag for each bucket and parameter.
        """
        if not any(counts):
            return None
        rest = iter(counts)
        changed = [[bool(view.numel()) and next(rest) > 0 for view in point.views] for point in points]
        same = self._same(points, changed, present)
        return [[a and b for a, b in zip(*pair)] for pair in zip(changed, same)]

    def warn_if_ranks_differ(self, points: Sequence[FlatBuffer], present: int) -> None:
        """Warn, on every rank, if ranks start with different parameters (collective)."""
        everything = [[bool(view.numel()) for view in point.views] for point in points]
        if not all(map(all, self._same(points, everything, present))):
            warnings.warn(
                f"hvd_compress: at the first step parameters differ between ranks (this is rank {self._comm.rank}); "
                "call hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training",
                stacklevel=7,
            )

    def _sample(self, points: Sequence[FlatBuffer]) -> list[Tensor]:
        """Return for each bucket the bits of its parameters' samples, a row per parameter that is not empty."""
        samples = [_bits(point.flat).index_select(0, index) for point, index in zip(points, self._index)]
        return [values.view(-1, SAMPLES) for values in samples]

    def _same(self, points: Sequence[FlatBuffer], compared: list[list[bool]], present: int) -> list[list[bool]]:
        """Return whether each compared parameter is the same on all ranks (collective); True for the others."""
        if self._comm.size == 1 or not any(map(any, compared)):
            return [[True] * len(flags) for flags in compared]
        device = points[0].flat.device
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        # All of a parameter is compared, not its samples: the shared model must not differ anywhere.
        digests = torch.stack(
            [
                digest(piece).to(device) if compare else nothing
                for point, flags in zip(points, compared)
                for piece, compare in zip(pieces(point.flat, [view.numel() for view in point.views]), flags)
            ]
        )
        words = torch.stack([(digests >> (BITS * k)) & (2**BITS - 1) for k in range(WORDS)])
        table = torch.stack((words, words.square()))
        self._comm.allreduce(table, "overwritten.same", Sum)
        equal = iter((table[0].square() == table[1] * present).all(0).tolist())
        return [[next(equal) for _ in flags] for flags in compared]


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _sample_index(point: FlatBuffer) -> Tensor:
    """Return the places of a flat vector that are sampled: SAMPLES for each parameter that is not empty."""
    device, start = point.flat.device, 0
    places = [torch.zeros(0, dtype=torch.int64, device=device)]
    for view in point.views:
        if view.numel():
            even = torch.linspace(start, start + view.numel() - 1, SAMPLES, dtype=torch.float64, device=device)
            places.append(even.round().to(torch.int64))
        start += view.numel()
    return torch.cat(places)
