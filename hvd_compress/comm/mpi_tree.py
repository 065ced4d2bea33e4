"""Trees of pairwise messages: log2(P) rounds, any number of ranks. The only file that imports ``mpi4py``.

They run beside Horovod in one job, in an MPI communicator of their own. Only buffers travel: mpi4py's methods with
lower-case names would pickle what they send, and run what they receive. Horovod's background thread calls MPI too,
so MPI must have been initialised for several threads, which Horovod does.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import numpy as np
import numpy.typing as npt

from hvd_compress.comm.communicator import Communicator, uses_mpi
from hvd_compress.comm.handle import wait_in_time

Array = npt.NDArray[Any]

REMEDY = (
    "start the job with mpirun or srun --mpi=pmix and a Horovod that was built with MPI (horovodrun --check-build "
    'says so), or choose exchange="allreduce"'
)


def require(owner: str, comm: Communicator) -> None:
    """Raise ValueError with the remedy unless the ranks of ``comm`` can exchange messages by MPI.

    Args:
        owner: the argument that asks for it, for the message.
    """
    if comm.size == 1:
        return
    if not uses_mpi():
        raise ValueError(f"{owner} needs MPI, and this job does not use it (rank {comm.rank}); {REMEDY}")
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(
            f"{owner} needs mpi4py, which cannot be imported here: {error} (rank {comm.rank}); install mpi4py for the "
            "MPI that Horovod was built with"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ValueError(
            f"{owner} needs an MPI that serves several threads, as Horovod runs beside it (rank {comm.rank}); call "
            "hvd.init() before anything imports mpi4py, or set mpi4py.rc.thread_level = 'multiple'"
        )


class Tree:
    """Pairwise exchanges among the ranks of one process set.

    Attributes:
        size: number of ranks.
        rank: this rank.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.size, self.rank = comm, comm.size, comm.rank

    @functools.cached_property
    def _mpi(self) -> Any:
        """Create the MPI communicator, at the first message: all ranks must take part in that."""
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        return world.Create_group(world.Get_group().Incl(self._comm.global_ranks), tag=self._comm.ordinal)

    def _send(self, data: Array, to: int) -> None:
        wait_in_time(self._mpi.Isend(data, dest=to).Test, self._comm, f"message to rank {to}")
        self._comm.bytes_sent += data.nbytes

    def _receive(self, data: Array, source: int) -> None:
        with self._full(data, source) as status:
            request = self._mpi.Irecv(data, source=source)
            wait_in_time(lambda: request.Test(status), self._comm, f"message from rank {source}")

    def _swap(self, data: Array, other: Array, partner: int) -> None:
        sending = self._mpi.Isend(data, dest=partner)
        self._receive(other, partner)
        wait_in_time(sending.Test, self._comm, f"message to rank {partner}")
        self._comm.bytes_sent += data.nbytes

    @contextlib.contextmanager
    def _full(self, data: Array, source: int) -> Iterator[Any]:
        """Give a status for a message that is received inside, and raise RuntimeError unless it fills ``data``.

        This rank ends with that, and the job with it, as with any rank that fails.
        """
        from mpi4py import MPI

        status = MPI.Status()
        wanted = f"where {data.nbytes} bytes are expected (seen by rank {self.rank})"
        try:
            yield status
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            raise RuntimeError(f"corrupted message from rank {source}: it is longer, {wanted}") from error
        if (count := status.Get_count(MPI.BYTE)) != data.nbytes:
            raise RuntimeError(f"corrupted message from rank {source}: {count} bytes {wanted}")

    def allreduce(self, values: Array) -> None:
        """Sum ``values`` over ranks, in place: log2(P) rounds in which each rank sends everything once.

        In every round both partners add the same two numbers, so all ranks get the same bits. Ranks beyond
        the largest power of two add their values to a partner's first, and get the result from it.
        """
        other = np.empty_like(values)
        core = 1 << (self.size.bit_length() - 1)
        if self.rank >= core:
            self._send(values, self.rank - core)
            self._receive(values, self.rank - core)
            return
        if self.rank + core < self.size:
            self._receive(other, self.rank + core)
            values += other
        distance = 1
        while distance < core:
            self._swap(values, other, self.rank ^ distance)
            values += other
            distance *= 2
        if self.rank + core < self.size:
            self._send(values, self.rank + core)

    def reduce(self, message: Array, merge: Callable[[Array, Array, int], Array]) -> Array:
        """Merge the ranks' messages, all of one size, in a binomial tree; every rank gets the outcome.

        Args:
            message: bytes of this rank.
            merge: (mine, the partner's, the partner's rank) to one message; called on the ranks where branches meet.
        """
        distance = 1
        while distance < self.size:
            if self.rank % (2 * distance) == distance:
                self._send(message, self.rank - distance)
                break
            if self.rank + distance < self.size:
                other = np.empty_like(message)
                self._receive(other, self.rank + distance)
                message = merge(message, other, self.rank + distance)
            distance *= 2
        return self._broadcast(message)

    def _broadcast(self, message: Array) -> Array:
        """Send the message of rank 0 to all ranks, by the same tree backwards."""
        distance = 1
        while distance < self.size:
            distance *= 2
        result: Array = message.copy()
        while distance > 1:
            half = distance // 2
            if self.rank % distance == half:
                self._receive(result, self.rank - half)
            elif self.rank % distance == 0 and self.rank + half < self.size:
                self._send(result, self.rank + half)
            distance = half
        return result
