"""Notices that parameters were written between steps, by a broadcast or by loading a model or a part of it.

Algorithms that exchange updates keep a shared model besides the parameters. A parameter that has been
overwritten with the same values on every rank is the model's now. If each rank has changed its own
(clipping weights, say), that is part of its update. Either way all ranks must decide alike, and the root
of a broadcast sees nothing change; so at each step the number of ranks that saw a parameter change is
summed, for each parameter, while backward runs. Only if there is one, its values are compared over ranks.
"""

from __future__ import annotations

import warnings
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.residual_update import TILE
from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Communicator, Handle, Sum, is_elastic
from hvd_compress.compressors.base import pieces
from hvd_compress.engine import join_check as presence
from hvd_compress.telemetry import Recorder

SAMPLES = 16  # per parameter, evenly spread: of a small one, every element
# A digest of 63 bits as three words: the ranks' sum of a word, squared, is the number of ranks times the sum of
# its squares only if all ranks have the same word; integers of 64 bits hold both.
WORDS, BITS = 3, 21


class Rewrites:
    """Lets parameters that were written between steps become the shared model of the states that have one."""

    def __init__(self, comm: Communicator, recorder: Recorder) -> None:
        self._comm, self._recorder, self._watch = comm, recorder, RewriteWatch(comm)

    def look(self, states: Sequence[UpdateState]) -> None:
        """Start to compare the parameters with where they were put (collective), unless that has been started."""
        if not self._watch.launched:
            for state in states:
                state.bucket.ensure_params_in(state.local)
            self._watch.launch([state.local for state in states])

    def heed(self, states: Sequence[UpdateState], first: bool, needs_all: bool) -> None:
        """What all ranks have rewritten alike since the last step is the shared model now.

        Args:
            first: no step has been taken yet.
            needs_all: raise if a rank has joined (``hvd.join()``): what follows is more than allreduces.
        """
        self.look(states)
        before = self._comm.sent
        rewritten = self._watch.rewritten([state.local for state in states], first=first)
        self._recorder.aside(self._comm.sent - before)
        if needs_all and not self._watch.complete:
            raise presence.absent(self._comm)
        if rewritten is not None:
            for state, flags in zip(states, rewritten):
                state.heed(flags, alone=self._comm.size == 1)
            self.remember(states)

    def remember(self, states: Sequence[UpdateState]) -> None:
        """The parameters stand where the algorithm has put them."""
        self._watch.remember([state.local for state in states])

    def forget(self) -> None:
        """What was remembered no longer counts."""
        self._watch.forget()


class RewriteWatch:
    """Watches the parameters of one optimizer; every method takes its buckets' parameters, as views of flat vectors."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._seen: list[Tensor] = []
        self._index: list[Tensor] = []
        self._row: Optional[Tensor] = None
        self._pending: Optional[Handle] = None
        self._fresh = True
        self.complete = True  # no rank was missing when last asked

    @property
    def launched(self) -> bool:
        """Whether a comparison is under way."""
        return self._pending is not None

    def _sample(self, points: Sequence[FlatBuffer]) -> list[Tensor]:
        """For each bucket the bits of its parameters' samples, a row for each parameter that is not empty."""
        if len(self._index) != len(points):
            self._fresh = True
            self._index = [_spread(point) for point in points]
        samples = [_bits(point.flat).index_select(0, index) for point, index in zip(points, self._index)]
        return [values.view(-1, SAMPLES) for values in samples]

    def remember(self, points: Sequence[FlatBuffer]) -> None:
        """The parameters stand where the algorithm has put them."""
        self._seen = self._sample(points)
        self._fresh = False

    def forget(self) -> None:
        """What was remembered no longer counts: a state was loaded, or a step given up (on all ranks alike)."""
        if self._pending is not None and not is_elastic():  # its name is needed again
            self._pending.wait()
        self._fresh, self._pending, self._row = True, None, None

    def launch(self, points: Sequence[FlatBuffer]) -> None:
        """Start to tell the other ranks what has changed (collective), unless that has been started."""
        if self._pending is not None or not points:
            return
        now, device = self._sample(points), points[0].flat.device
        if self._fresh:
            changed = [torch.ones(len(values), dtype=torch.float32, device=device) for values in now]
        else:
            changed = [(a != b).any(1).to(device, torch.float32) for a, b in zip(now, self._seen)]
        # A rank that has joined (hvd.join()) takes part with zeros, which shows in the first number.
        self._row = torch.cat((torch.ones(1, dtype=torch.float32, device=device), *changed))
        self._pending = self._comm.allreduce_async(self._row, "rewrites", Sum)

    def rewritten(self, points: Sequence[FlatBuffer], first: bool = False) -> Optional[list[list[bool]]]:
        """Finish what ``launch`` started (the host reads a row of numbers: the one synchronisation of a step).

        Args:
            points: as they were given to ``launch``, perhaps with new buckets at the end.
            first: no step has been taken yet; warn if ranks start from different parameters.

        Returns:
            None if no rank saw a parameter change; else for each bucket and parameter whether it was rewritten,
            with the same values on all ranks.
        """
        if self._pending is None or self._row is None:
            return None
        pending, row = self._pending, self._row
        self._pending, self._row = None, None
        pending.wait()
        present, *counts = row.tolist()
        self.complete = present > self._comm.size - 0.5
        if not any(counts):
            return None
        numels = [[view.numel() for view in point.views] for point in points[: len(self._index)]]
        rest = iter(counts)
        changed = [[numel > 0 and next(rest) > 0 for numel in some] for some in numels]
        same = self._same(points, numels, changed, round(present))
        if first and not all(map(all, same)):
            warnings.warn(
                f"hvd_compress: at the first step parameters differ between ranks (this is rank {self._comm.rank}); "
                "call hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training",
                stacklevel=7,
            )
        return [[a and b for a, b in zip(*pair)] for pair in zip(changed, same)]

    def _same(
        self, points: Sequence[FlatBuffer], numels: list[list[int]], changed: list[list[bool]], present: int
    ) -> list[list[bool]]:
        """Whether each parameter that has changed is the same on all ranks (collective); True for the others."""
        if self._comm.size == 1:
            return [[True] * len(some) for some in numels]
        device = points[0].flat.device
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        # All of a parameter, not its samples: the shared model must not differ anywhere.
        digests = torch.stack(
            [
                digest(piece).to(device) if looked_at else nothing
                for point, some, flags in zip(points, numels, changed)
                for piece, looked_at in zip(pieces(point.flat, some), flags)
            ]
        )
        words = torch.stack([(digests >> (BITS * k)) & (2**BITS - 1) for k in range(WORDS)])
        table = torch.stack((words, words.square()))
        self._comm.allreduce(table, "rewrites.same", Sum)
        equal = iter((table[0].square() == table[1] * present).all(0).tolist())
        return [[next(equal) for _ in some] for some in numels]


def digest(values: Tensor) -> Tensor:
    """An int64 that depends on every bit of the vector ``values`` and on their order."""
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
    tile = min(bits.numel(), TILE) if bits.device.type == "cpu" else bits.numel()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if not tile:
        return total
    weights = torch.arange(1, tile + 1, device=bits.device) * 2654435761 | 1
    for part in torch.split(bits, tile):
        total = total * 6364136223846793005 + (part * weights[: part.numel()]).sum()
    return total ^ (total >> 32)  # of round numbers the low bits are zeros


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _spread(point: FlatBuffer) -> Tensor:
    """Where to look in a flat vector: SAMPLES places for each parameter that is not empty."""
    device, start = point.flat.device, 0
    places = [torch.zeros(0, dtype=torch.int64, device=device)]
    for view in point.views:
        if view.numel():
            even = torch.linspace(start, start + view.numel() - 1, SAMPLES, dtype=torch.float64, device=device)
            places.append(even.round().to(torch.int64))
        start += view.numel()
    return torch.cat(places)
