"""Is everyone here? After ``hvd.join()`` on one rank, Horovod can only do allreduces with the others.

Anything else raises, or brings the job down if Horovod has seen it before and answers from its cache. So
algorithms that gather payloads call the roll first, by an allreduce that travels while backward runs: a rank
that has joined counts as zero.
"""

from __future__ import annotations

from typing import Optional

import torch

from hvd_compress.comm.communicator import Communicator, Handle, Sum


def absent(comm: Communicator) -> RuntimeError:
    """What to raise where a rank is missing."""
    return RuntimeError(
        f"a rank has called hvd.join(), and this algorithm's payloads cannot be summed by an allreduce, which is all "
        f"that works then (rank {comm.rank}). Give all ranks the same number of steps, or use an algorithm whose "
        "payloads are summed, such as EF or DEF with RandomBlock. Nothing was exchanged and nothing is lost"
    )


class JoinCheck:
    """One small allreduce per step, for one optimizer."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._count = torch.zeros(1, dtype=torch.float32)
        self._pending: Optional[Handle] = None
        self._complete = False

    def launch(self) -> None:
        """Begin to count (collective), unless that has been done for this step."""
        if self._pending is None and not self._complete:
            self._count.fill_(1.0)
            self._pending = self._comm.allreduce_async(self._count, "present", Sum)

    def check(self) -> None:
        """Raise RuntimeError, alike on every rank that is here, if another is not."""
        self.launch()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
            if float(self._count) < self._comm.size - 0.5:
                raise absent(self._comm)
            self._complete = True

    def close_step(self) -> None:
        """The next step needs a roll call of its own."""
        self._complete = False
