"""One small allreduce before each exchange: is every rank here, and which parameters were overwritten since the last?

Horovod can only do allreduces once a rank has called ``hvd.join()``; anything else raises, or brings the job down if
Horovod has seen it before and answers from its cache. A rank that has joined takes part in an allreduce with zeros.

Algorithms that exchange updates keep a shared model besides the parameters. A parameter that has been overwritten with
the same values on every rank (by a broadcast, by loading a model) is the model's now. If each rank has changed its own
(clipping weights, say), that is part of its update. Either way all ranks must decide alike, and the root of a broadcast
sees nothing change; so the number of ranks that saw a parameter change is summed, for each parameter, while backward
runs. Only if there is one, its values are compared over ranks.
"""

from __future__ import annotations

import warnings
from typing import Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import RANKS_JOINED, Communicator, Handle, Sum, is_elastic
from hvd_compress.compressors.layout import pieces
from hvd_compress.engine.replica_check import digest

SAMPLES = 16  # per parameter, evenly spread: of a small one, every element
# A digest of 63 bits as three words: the ranks' sum of a word, squared, is the number of ranks times the sum of
# its squares only if all ranks have the same word; integers of 64 bits hold both.
WORDS, BITS = 3, 21


class StepCheck:
    """The check of one optimizer. Methods take its buckets' parameters; without any, only the ranks are counted.

    Attributes:
        complete: whether no rank was missing when the check was last finished.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._recorded: list[Tensor] = []
        self._index: list[Tensor] = []
        self._row: Optional[Tensor] = None
        self._handle: Optional[Handle] = None
        self._fresh = True
        self._passed = False
        self.complete = True

    # -- every rank is here ------------------------------------------------------------------------------

    def require_all_ranks(self) -> None:
        """Raise RuntimeError, alike on every rank that takes part, if another has joined (collective, once a step)."""
        if not self._passed:
            self.launch_check(())
            self.overwritten(())
            self.raise_if_joined()
            self._passed = True

    def raise_if_joined(self) -> None:
        """Raise RuntimeError if a rank was missing at the last check."""
        if not self.complete:
            raise ranks_joined_error(self._comm.rank)

    def close_step(self) -> None:
        """Let the next step check the ranks anew."""
        self._passed = False

    # -- parameters that were overwritten ----------------------------------------------------------------

    def record_parameters(self, points: Sequence[FlatBuffer]) -> None:
        """Note the parameters as they are: the algorithm has placed them."""
        self._recorded = self._sample(points)
        self._fresh = False

    def forget(self) -> None:
        """Drop what was recorded: a state was loaded, or a step given up (on all ranks alike)."""
        if self._handle is not None and not is_elastic():  # its name is needed again
            self._handle.wait()
        self._fresh, self._handle, self._row = True, None, None

    def launch_check(self, points: Sequence[FlatBuffer]) -> None:
        """Start to tell the other ranks what has changed (collective), unless that has been started for this step."""
        if self._handle is not None or self._passed:
            return
        now = self._sample(points)
        device = points[0].flat.device if points else torch.device("cpu")
        if self._fresh:
            changed = [torch.ones(len(values), dtype=torch.float32, device=device) for values in now]
        else:
            changed = [(a != b).any(1).to(device, torch.float32) for a, b in zip(now, self._recorded)]
        # A rank that has joined takes part with zeros, which shows in the first number.
        self._row = torch.cat((torch.ones(1, dtype=torch.float32, device=device), *changed))
        self._handle = self._comm.allreduce_async(self._row, "step_check", Sum)

    def overwritten(self, points: Sequence[FlatBuffer], first: bool = False) -> Optional[list[list[bool]]]:
        """Finish what ``launch_check`` started (the host reads a row of numbers: the one synchronisation of a step).

        Args:
            points: as they were given to ``launch_check``, perhaps with new buckets at the end.
            first: no step has been taken yet; warn if ranks start from different parameters.

        Returns:
            None if no rank saw a parameter change; else for each bucket and parameter whether it was overwritten,
            with the same values on all ranks.
        """
        if self._handle is None or self._row is None:
            return None
        handle, row = self._handle, self._row
        self._handle, self._row = None, None
        handle.wait()
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

    def _sample(self, points: Sequence[FlatBuffer]) -> list[Tensor]:
        """Return for each bucket the bits of its parameters' samples, a row per parameter that is not empty."""
        if len(self._index) != len(points):
            self._fresh = True
            self._index = [_sample_index(point) for point in points]
        samples = [_bits(point.flat).index_select(0, index) for point, index in zip(points, self._index)]
        return [values.view(-1, SAMPLES) for values in samples]

    def _same(
        self, points: Sequence[FlatBuffer], numels: list[list[int]], changed: list[list[bool]], present: int
    ) -> list[list[bool]]:
        """Return whether each changed parameter is the same on all ranks (collective); True for the others."""
        if self._comm.size == 1:
            return [[True] * len(some) for some in numels]
        device = points[0].flat.device
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        # All of a parameter is compared, not its samples: the shared model must not differ anywhere.
        digests = torch.stack(
            [
                digest(piece).to(device) if compare else nothing
                for point, some, flags in zip(points, numels, changed)
                for piece, compare in zip(pieces(point.flat, some), flags)
            ]
        )
        words = torch.stack([(digests >> (BITS * k)) & (2**BITS - 1) for k in range(WORDS)])
        table = torch.stack((words, words.square()))
        self._comm.allreduce(table, "step_check.same", Sum)
        equal = iter((table[0].square() == table[1] * present).all(0).tolist())
        return [[next(equal) for _ in some] for some in numels]


def ranks_joined_error(rank: int) -> RuntimeError:
    """Return the error for a rank that is missing, to be raised on every rank that takes part."""
    return RuntimeError(
        f"{RANKS_JOINED} (rank {rank}; the payloads of this algorithm cannot be summed by an allreduce). Nothing was "
        "exchanged and nothing is lost"
    )


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
