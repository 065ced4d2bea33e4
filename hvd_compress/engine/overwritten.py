"""Parameters that a script has written between steps, for algorithms that keep a shared model besides them.

The rule: what all ranks have written alike, whole parameters or the same elements of one, is the model's at once. A
model that is put back to where it was after an earlier step, on each rank to its own point there, is rolled back:
nothing stays pending. What else a rank has written is part of its next update.

Every element counts: a digest of all parameters is compared with that of where they were placed, at each step. Ranks
must decide alike, and the root of a broadcast sees nothing change; so the number of ranks that saw a change is summed
with the step's check. Only if there is one, it is looked at which parameters and elements it is.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from hvd_compress.bucket import FlatBuffer
from hvd_compress.comm.communicator import Communicator, Sum
from hvd_compress.compressors.layout import pieces
from hvd_compress.digest import digest
from hvd_compress.engine.step_check import BITS, WORDS

# What all ranks have written alike of a parameter: everything, the elements of a mask (flat), or nothing.
Alike = Union[bool, Tensor]


class Written(NamedTuple):
    """Findings about what ranks have written, the same on every rank but for the masks.

    Attributes:
        alike: for each bucket and parameter what all ranks have written alike.
        differing: for each bucket and parameter whether a rank has written something else.
        rolled_back: whether all parameters are where they were after an earlier step.
    """

    alike: list[list[Alike]]
    differing: list[list[bool]]
    rolled_back: bool


class Overwritten:
    """The watch over one optimizer's parameters; methods take this rank's own points, bucket by bucket."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._placed: list[Tensor] = []
        self._steps: list[int] = []
        self._former: list[Tensor] = []  # of each bucket: digests of earlier points, in the order of ``_steps``

    def record(self, points: Sequence[FlatBuffer], step: int) -> None:
        """Note the parameters as they are: the algorithm has placed them after so many steps."""
        self._placed = self.remember(points, step)

    def remember(self, points: Sequence[FlatBuffer], step: int) -> list[Tensor]:
        """Note that a script may copy the parameters as they are, to put them back later; return their digests."""
        count, digests = len(self._steps), [digest(point.flat) for point in points]
        self._steps.append(step)
        for index, found in enumerate(digests):
            if index == len(self._former):
                self._former.append(torch.zeros(max(64, count + 1), dtype=torch.int64, device=found.device))
            if count >= len(self._former[index]):
                self._former[index] = torch.cat((self._former[index], torch.zeros_like(self._former[index])))
            self._former[index][count] = found
        return digests

    def forget(self) -> None:
        """Drop all earlier points: a state was loaded."""
        self._steps.clear()

    @property
    def recorded(self) -> int:
        """Number of buckets of which it is known where their parameters were placed."""
        return len(self._placed)

    def flags(self, points: Sequence[FlatBuffer]) -> list[Tensor]:
        """Return for each recorded bucket whether one of its parameters has changed since ``record``."""
        return [digest(point.flat) != placed for point, placed in zip(points, self._placed)]

    def any_written(self, points: Sequence[FlatBuffer]) -> Union[bool, Tensor]:
        """Return whether any has changed, or there are buckets that are not recorded; on an accelerator if one is."""
        flags = self.flags(points)
        if len(flags) < len(points) or not points:
            return True
        on_host = any(bool(flag) for flag in flags if flag.device.type == "cpu")
        others = [flag for flag in flags if flag.device.type != "cpu"]
        return torch.stack(others).any() if others and not on_host else on_host

    def find(
        self, points: Sequence[FlatBuffer], placed: Sequence[Optional[Tensor]], present: int, step: int
    ) -> Written:
        """Find out what was written (collective).

        Args:
            points: buckets in which a rank has seen a change, or all.
            placed: for each where the parameters had been placed, flat; None if this is not known to the element.
            present: number of ranks that take part.
            step: number of the present step.
        """
        rows, masks = [], []
        for point, before in zip(points, placed):
            numels = [view.numel() for view in point.views]
            mask = None if before is None else _bits(point.flat) != _bits(before)
            masks.append([None] * len(numels) if mask is None else list(pieces(mask, numels)))
            for values, changed in zip(pieces(point.flat, numels), masks[-1]):
                rows.append(_row(values, changed).cpu())
        former = torch.tensor([self._former_step(points, step)], dtype=torch.int64, device="cpu")
        table = torch.stack(rows) if rows else torch.zeros((0, 3), dtype=torch.int64, device="cpu")
        equal, seen = self._compare(table, former, present)
        by_parameter = iter(zip(equal, seen))
        alike: list[list[Alike]] = []
        differing: list[list[bool]] = []
        for parts in masks:
            verdicts = [_alike(*next(by_parameter), present, changed) for changed in parts]
            alike.append([a for a, _ in verdicts])
            differing.append([d for _, d in verdicts])
        known = equal[-1][0] and int(former) >= 0
        # Or one rank's earlier point was broadcast to all.
        everything = all(whole for whole, _ in equal[:-1])
        return Written(alike, differing, rolled_back=known or (everything and seen[-1] > 0))

    def _former_step(self, points: Sequence[FlatBuffer], step: int) -> int:
        """Return the earlier step after which all parameters were where they are now, or -1."""
        if not points or len(points) < len(self._former):
            return -1
        count = len(self._steps)
        same = torch.ones(count, dtype=torch.bool, device="cpu")
        for point, former in zip(points, self._former):
            same &= (former[:count] == digest(point.flat)).cpu()
        found = same.nonzero()
        last = self._steps[int(found[-1])] if len(found) else -1
        return last if last < step else -1

    def _compare(self, table: Tensor, former: Tensor, present: int) -> tuple[list[list[bool]], list[int]]:
        """Return for each row which of its two digests are equal on all ranks, and how many ranks saw a change.

        A last row is for ``former``, and says how many ranks have one.
        """
        digests = torch.cat((table[:, 1:], torch.stack((former, former), dim=1)))
        seen = torch.cat((table[:, 0], (former >= 0).to(torch.int64)))
        words = torch.stack([(digests >> (BITS * k)) & (2**BITS - 1) for k in range(WORDS)])
        sums = torch.cat((words.flatten(), words.square().flatten(), seen))
        self._comm.allreduce(sums, "overwritten", Sum)
        total, squares = (part.view(words.shape) for part in (sums[: words.numel()], sums[words.numel() : -len(seen)]))
        equal: list[list[bool]] = (total.square() == squares * present).all(0).tolist()
        return equal, sums[-len(seen) :].tolist()


def _row(values: Tensor, changed: Optional[Tensor]) -> Tensor:
    """Return whether a parameter has changed, the digest of its values, and that of what has changed and where."""
    if changed is None:
        whole = digest(values)
        return torch.stack((torch.ones_like(whole), whole, whole))
    written = torch.where(changed, values, torch.zeros_like(values))
    places = digest(changed.to(torch.int32).view(torch.float32))
    return torch.stack((changed.any().to(torch.int64), digest(values), digest(written) ^ (places << 1)))


def _alike(equal: Sequence[bool], seen: int, present: int, changed: Optional[Tensor]) -> tuple[Alike, bool]:
    """Return what was written alike of a parameter, and whether something was that was not."""
    if not seen:
        return False, False
    if equal[0]:
        return True, False
    if changed is not None and seen == present and equal[1]:
        return changed, False
    return False, True


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
