"""One small allreduce at the beginning of each step: is every rank here, at the same step, with the same parameters?

What ranks draw or launch by a number of their own must be the same number. A step that begins by itself on each rank
would take that for granted; after ``hvd.join()``, a broadcast, or a layer unfrozen on some ranks only it is not so, and
ranks would send different coordinates as if they were the same, or wait for each other for ever. So nothing is launched
before this check has arrived. It is sent with the first gradient, and never waited for during backward.

Horovod can only do allreduces once a rank has called ``hvd.join()``; anything else raises, or brings the job down if
Horovod has seen it before and answers from its cache. A rank that has joined takes part in an allreduce with zeros.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from hvd_compress.comm.communicator import RANKS_JOINED, Communicator, Handle, Max, Sum

# A number of up to 63 bits travels as words: sums of words and of their squares over 2,048 ranks are exact in float64.
WORDS, BITS = 3, 21


class Verdict(NamedTuple):
    """The result of a check, the same on every rank.

    Attributes:
        present: number of ranks that have not called ``hvd.join()``.
        equal: for each number whether it is the same on all of them.
        scaled: whether a rank's gradients come from a GradScaler.
        moved: whether a rank has another number than before, or has just come (elastic jobs).
        written: whether a rank's script has written into its parameters, or a rank does not know.
    """

    present: int
    equal: tuple[bool, ...]
    scaled: bool
    moved: bool
    written: bool


class StepCheck:
    """The check of one optimizer."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._numbers = 0
        self._row: Optional[Tensor] = None
        self._handle: Optional[Handle] = None

    @property
    def launched(self) -> bool:
        """True from ``launch`` to ``finish``."""
        return self._handle is not None

    @property
    def arrived(self) -> bool:
        """True if ``finish`` would not wait for another rank."""
        return self._handle is not None and self._handle.done()

    def launch(
        self, numbers: Sequence[int], scaled: bool = False, moved: bool = False, written: Union[bool, Tensor] = False
    ) -> None:
        """Start to compare ``numbers`` over ranks and to sum flags (collective).

        Args:
            scaled: whether this rank's gradients come from a GradScaler.
            moved: whether this rank has another number than before, or has just come.
            written: whether a script has written into this rank's parameters, perhaps on a device.
        """
        squared = [part for number in numbers for word in _words(number) for part in (word, word * word)]
        # A rank that has joined takes part with zeros, which shows in the first number.
        known = [1, *squared, int(scaled), int(moved)]
        if isinstance(written, Tensor) and written.device.type != "cpu":
            row = torch.zeros(len(known) + 1, dtype=torch.float64, device=written.device)
            for place, value in zip(row, known):  # a copy of the host's numbers would make it wait
                place.fill_(value)
            row[-1].copy_(written)
        else:
            row = torch.tensor([*known, int(written)], dtype=torch.float64, device="cpu")
        self._numbers, self._row = len(numbers), row
        self._handle = self._comm.allreduce_async(row, "step_check", Sum)

    def finish(self) -> Verdict:
        """Wait for what ``launch`` has started and return it (the one host synchronisation of a step)."""
        assert self._handle is not None
        assert self._row is not None
        handle, row = self._handle, self._row
        self._handle, self._row = None, None
        handle.wait()
        present, *rest = row.tolist()
        words = list(zip(rest[0::2], rest[1::2]))[: WORDS * self._numbers]
        # P numbers are equal if, and only if, the square of their sum is P times the sum of their squares.
        same = [int(total) ** 2 == round(present) * int(squares) for total, squares in words]
        equal = tuple(all(same[i : i + WORDS]) for i in range(0, len(same), WORDS))
        return Verdict(round(present), equal, *(flag > 0 for flag in rest[-3:]))

    def forget(self, wait: bool) -> None:
        """Drop a check that has been launched; ``wait`` for it, as its name is needed again, unless a peer has died."""
        if self._handle is not None and wait:
            self._handle.wait()
        self._handle, self._row = None, None


def largest(comm: Communicator, numbers: Sequence[int]) -> list[int]:
    """Return the largest of each number over ranks (collective)."""
    found: list[int] = comm.allreduce(
        torch.tensor(list(numbers), dtype=torch.int64, device="cpu"), "largest", Max
    ).tolist()
    return found


def ranks_joined_error(rank: int) -> RuntimeError:
    """Return the error for a rank that is missing, to be raised on every rank that takes part."""
    return RuntimeError(
        f"{RANKS_JOINED} (rank {rank}; the payloads of this algorithm cannot be summed by an allreduce). Nothing was "
        "exchanged and nothing is lost"
    )


def different_methods_error(rank: int, action: str) -> RuntimeError:
    """Return the error for ranks that have met in different methods, to be raised on every rank."""
    return RuntimeError(
        f"DistributedOptimizer: ranks are in different methods (rank {rank} is in {action}). step(), consensus(), "
        "flush() and adopt_parameters() exchange data: call them on all ranks, in the same order"
    )


def different_parameters_error(rank: int) -> ValueError:
    """Return the error for ranks with different parameters, to be raised on every rank."""
    return ValueError(
        f"DistributedOptimizer: ranks have different parameters, or have frozen others (this is rank {rank}). Add, "
        "freeze and unfreeze parameters on all ranks alike"
    )


def number_of(content: bytes) -> int:
    """Return a hash of 63 bits, as a number that can be compared."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _words(number: int) -> list[int]:
    return [(number >> (BITS * k)) & (2**BITS - 1) for k in range(WORDS)]
