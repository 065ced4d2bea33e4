"""Horovod's collectives: asynchronous, named, counted."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from typing import Any, Callable, Iterator, NamedTuple

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_compress.comm import plain_values
from hvd_compress.comm.handle import Handle as Handle
from hvd_compress.comm.handle import HorovodInternalError as HorovodInternalError
from hvd_compress.comm.handle import time_limit
from hvd_compress.comm.handle import uses_mpi as uses_mpi

Adasum, Average, Max, Sum = hvd.Adasum, hvd.Average, hvd.Max, hvd.Sum
Compression = hvd.Compression
ProcessSet = hvd.ProcessSet
global_process_set = hvd.global_process_set
horovod_optimizer = hvd.DistributedOptimizer

RANKS_JOINED = (
    "a rank has called hvd.join(), after which only an allreduce works: give all ranks the same number of steps, or "
    "use an algorithm whose payloads are summed, such as EF or DEF with RandomBlock"
)

# By the object: Horovod gives the number of a process set that was removed to the next one, of other ranks.
_opened: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def is_initialized() -> bool:
    """Return True after ``hvd.init()``."""
    return bool(hvd.is_initialized())


def is_elastic() -> bool:
    """Return True in a job started by elastic Horovod."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def on_elastic_commit(kind: type, commit: Callable[[Any], None]) -> None:
    """Have ``commit(value)`` called, on all ranks, whenever an elastic state commits a value of type ``kind``.

    Horovod's own state of optimizers is saved also if that raises, as the model's has been saved already.
    """
    from horovod.torch.elastic import state

    class Handler(state.OptimizerStateHandler):  # type: ignore[misc]
        def save(self) -> None:
            try:
                commit(self.value)
            finally:
                super().save()

        def set_value(self, value: Any) -> None:
            self.value = value
            super().save()

    state.set_handler_registry([(kind, Handler), *state.get_handler_registry()])


class Reduction(NamedTuple):
    """A way of combining ranks, in Horovod's terms.

    Attributes:
        op: Average or Sum.
        predivide: Horovod's ``gradient_predivide_factor``: divide by it before the sum, multiply after.
    """

    op: int = Average
    predivide: float = 1.0


def _require_writable(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError if Horovod's thread could not write a result for ``tensor``; it would end, and ranks hang."""
    if torch.is_inference_mode_enabled() or tensor.is_inference() or tensor.requires_grad:
        raise RuntimeError(
            f"{name} (rank {hvd.rank()}): a collective in torch.inference_mode(), or of a tensor made in it or that "
            "requires a gradient: use torch.no_grad() instead"
        )


class Communicator:
    """The collectives of one optimizer within its process set, under names that no other optimizer uses.

    Attributes:
        process_set: Horovod's process set.
        ordinal: how many communicators of this process set were opened before.
        time_limit: seconds that a rank waits for a collective.
        phase: the method that collectives belong to, for messages.
        bytes_sent: bytes that this rank has sent, by the volume formulas of ring algorithms.
        seconds_waited: time that this rank has spent blocked in collectives.
    """

    def __init__(self, process_set: Any) -> None:
        self.process_set = process_set
        self.time_limit = time_limit()
        self.phase = "DistributedOptimizer()"
        self.bytes_sent = 0.0
        self.seconds_waited = 0.0
        # Every member builds its optimizers in the same order, so a count per process set names them alike.
        self.ordinal = _opened.get(process_set, 0)
        self._prefix = f"hvd_compress.{self.ordinal}"
        _opened[process_set] = self.ordinal + 1

    @property
    def member(self) -> bool:
        """True if this rank belongs to the process set."""
        return bool(self.process_set.included())

    @property
    def size(self) -> int:
        """Number of ranks in the process set (may change in an elastic job)."""
        return int(self.process_set.size())

    @property
    def rank(self) -> int:
        """Rank of this process within the process set."""
        return int(self.process_set.rank())

    @property
    def global_ranks(self) -> list[int]:
        """The members' ranks in the whole job, in order."""
        return list(self.process_set.ranks or range(hvd.size()))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for other ranks."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Add this rank, the phase and the collective to the message of a HorovodInternalError."""
        try:
            yield
        except HorovodInternalError as error:
            joined = f": {RANKS_JOINED}" if "join" in str(error).lower() else ""
            raise HorovodInternalError(f"{error} (rank {hvd.rank()}, {self.phase}, {what}){joined}") from error

    def allreduce_async(
        self, tensor: Tensor, name: str, op: int = Average, prescale: float = 1.0, postscale: float = 1.0
    ) -> Handle:
        """Start to reduce ``tensor`` (contiguous; int32, int64, float16/32/64) over ranks by ``op``, in place."""
        _require_writable(tensor, name)
        if self.size == 1:
            if prescale * postscale != 1.0:
                tensor.mul_(prescale * postscale)
            return Handle()
        self.bytes_sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()
        what = f"allreduce {name!r}"
        with self.explaining(what):
            handle = hvd.allreduce_async_(
                tensor,
                name=f"{self._prefix}.{name}",
                op=op,
                prescale_factor=prescale,
                postscale_factor=postscale,
                process_set=self.process_set,
            )
        return Handle(handle, comm=self, what=what)

    def allreduce(self, tensor: Tensor, name: str, op: int = Average) -> Tensor:
        """Reduce ``tensor`` over ranks by ``op`` (Average, Sum, Max), in place, and return it."""
        self.allreduce_async(tensor, name, op).wait()
        return tensor

    def mean(self, tensor: Tensor, name: str, present: int) -> Tensor:
        """Return the mean over ranks (new; float32 or float64), which is ``tensor`` itself where all have the same.

        The sum of three equal numbers, divided by three, need not be that number. In float64 it is a float32 after
        rounding; of float64 numbers the distance from the first mean is averaged, too, and added.

        Args:
            present: number of ranks that have not joined; the others count as zeros.
        """
        mean = self.allreduce(tensor.to(torch.float64, copy=True), name, Sum).div_(present)
        if tensor.dtype == torch.float64:
            mean += self.allreduce(tensor - mean, f"{name}.rest", Sum).div_(present)
        return mean.to(tensor.dtype)

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is True on any rank (blocking; one number)."""
        return bool(self.allreduce(torch.tensor([int(flag)], dtype=torch.int32, device="cpu"), "any", Sum).item())

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to concatenate the ranks' tensors (any dtype but bfloat16) along the first dimension, in rank order."""
        _require_writable(tensor, name)
        if self.size == 1:
            return Handle(result=tensor)
        self.bytes_sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        what = f"allgather {name!r}"
        with self.explaining(what):
            handle = hvd.allgather_async(tensor, name=f"{self._prefix}.{name}", process_set=self.process_set)
        return Handle(handle, comm=self, what=what)

    def allgather(self, tensor: Tensor, name: str) -> Tensor:
        """Concatenate the ranks' tensors along the first dimension, in rank order."""
        result: Tensor = self.allgather_async(tensor, name).wait()
        return result

    def alltoall_async(self, tensor: Tensor, splits: Tensor, name: str) -> Handle:
        """Start to send ``splits[j]`` (int32, on the host) elements of ``tensor`` to each rank j.

        The handle's result is (received, concatenated in rank order; number of elements from each rank).
        """
        _require_writable(tensor, name)
        if self.size == 1:
            return Handle(result=(tensor, splits))
        own = int(splits[self.rank])
        self.bytes_sent += (tensor.numel() - own) * tensor.element_size()
        what = f"alltoall {name!r}"
        with self.explaining(what):
            handle = hvd.alltoall_async(tensor, splits, name=f"{self._prefix}.{name}", process_set=self.process_set)
        return Handle(handle, comm=self, what=what)

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Return every rank's ``value``, in rank order, on every rank (collective).

        Args:
            value: plain values, see ``plain_values.encode``.
            name: start of the names of the two collectives.

        Raises:
            TypeError: on every rank, if a rank has a value that cannot be sent.
            RuntimeError: on every rank, if what a rank has sent is malformed.
        """
        data = torch.frombuffer(bytearray(plain_values.message_of(value)), dtype=torch.uint8)
        lengths = self.allgather(torch.tensor([data.numel()], device="cpu"), f"{name}.length").tolist()
        received = self.allgather(data, f"{name}.data")
        if len(lengths) != self.size or min(lengths) < 1 or sum(lengths) != received.numel():
            raise RuntimeError(
                f"{name}: corrupted lengths {lengths} of what ranks 0 to {self.size - 1} have sent, {received.numel()} "
                f"bytes in all (seen by rank {self.rank})"
            )
        parts = [part.numpy().tobytes() for part in torch.split(received, lengths)]
        reader = f"{name} (seen by rank {self.rank})"
        return [plain_values.value_of(part, sender, reader) for sender, part in enumerate(parts)]
