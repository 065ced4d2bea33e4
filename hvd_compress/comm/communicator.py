"""Horovod's collectives: asynchronous, named, counted. The only file that imports ``horovod.torch``."""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from typing import Any, Callable, Optional

import horovod.torch as hvd
import torch
from torch import Tensor

Adasum, Average, Sum = hvd.Adasum, hvd.Average, hvd.Sum
Compression = hvd.Compression
ProcessSet = hvd.ProcessSet
global_process_set = hvd.global_process_set
horovod_optimizer = hvd.DistributedOptimizer

HorovodInternalError = hvd.HorovodInternalError

_communicators_opened: Counter[int] = Counter()


def is_initialized() -> bool:
    """True after ``hvd.init()``."""
    return bool(hvd.is_initialized())


def is_elastic() -> bool:
    """True in a job started by elastic Horovod."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def uses_mpi() -> bool:
    """Whether this job's Horovod talks MPI, so that other MPI libraries can be used beside it."""
    return bool(hvd.mpi_enabled())


class Handle:
    """A collective under way; ``wait`` returns its result, which in-place collectives have also put in place."""

    def __init__(self, handle: Optional[int], result: Any = None) -> None:
        self._handle, self._result = handle, result

    def wait(self) -> Any:
        """Block until done, leaving the processor to others meanwhile.

        Raises:
            HorovodInternalError: if a peer has failed, or has called ``hvd.join()`` and this is no allreduce.
        """
        if self._handle is None:
            return self._result
        handle, self._handle = self._handle, None
        # hvd.synchronize spins; ranks that share a core, and Horovod's own thread, would be slowed down.
        pause = 2e-5
        while not hvd.poll(handle):
            time.sleep(pause)
            pause = min(pause * 1.5, 2e-4)
        try:
            self._result = hvd.synchronize(handle)
        except HorovodInternalError as error:
            if "join" not in str(error).lower():
                raise
            raise HorovodInternalError(
                f"{error} (rank {hvd.rank()}). A rank has called hvd.join(), after which only an allreduce works: "
                "give all ranks the same number of steps, or use an algorithm whose payloads are summed, such as "
                "EF or DEF with RandomBlock. What this step was to send is held back, not lost"
            ) from error
        return self._result


class Communicator:
    """The collectives of one optimizer within its process set, under names that no other optimizer uses.

    Attributes:
        process_set: Horovod's process set.
        ordinal: how many links of this process set were opened before.
        sent: bytes this rank has put on the payload, by the volume formulas of ring algorithms.
    """

    def __init__(self, process_set: Any) -> None:
        self.process_set = process_set
        self.sent = 0.0
        # Every member builds its optimizers in the same order, so a count per process set names them alike.
        key = process_set.process_set_id or 0
        self.ordinal = _communicators_opened[key]
        self._prefix = f"hvd_compress.{self.ordinal}"
        _communicators_opened[key] += 1

    @property
    def member(self) -> bool:
        """Whether this rank belongs to the process set."""
        return bool(self.process_set.included())

    @property
    def size(self) -> int:
        """Ranks in the process set (may change in an elastic job)."""
        return int(self.process_set.size())

    @property
    def rank(self) -> int:
        """This rank within the process set."""
        return int(self.process_set.rank())

    @property
    def global_ranks(self) -> list[int]:
        """The members' ranks in the whole job, in order."""
        return list(self.process_set.ranks or range(hvd.size()))

    def allreduce_async(
        self, tensor: Tensor, name: str, op: int = Average, prescale: float = 1.0, postscale: float = 1.0
    ) -> Handle:
        """Sum or average ``tensor`` (contiguous; int32, int64, float16/32/64) over ranks, in place."""
        if self.size == 1:
            if prescale * postscale != 1.0:
                tensor.mul_(prescale * postscale)
            return Handle(None)
        self.sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()
        return Handle(
            hvd.allreduce_async_(
                tensor,
                name=f"{self._prefix}.{name}",
                op=op,
                prescale_factor=prescale,
                postscale_factor=postscale,
                process_set=self.process_set,
            )
        )

    def allreduce(self, tensor: Tensor, name: str, op: int = Average) -> Tensor:
        """Blocking ``allreduce_async``; returns ``tensor``."""
        self.allreduce_async(tensor, name, op).wait()
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether ``flag`` is True on any rank (blocking; one number)."""
        return bool(self.allreduce(torch.tensor([int(flag)], dtype=torch.int32), "any", Sum).item())

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        """Concatenate the ranks' tensors (any dtype but bfloat16) along the first dimension, in rank order."""
        if self.size == 1:
            return Handle(None, tensor)
        self.sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        return Handle(hvd.allgather_async(tensor, name=f"{self._prefix}.{name}", process_set=self.process_set))

    def allgather(self, tensor: Tensor, name: str) -> Tensor:
        """Blocking ``allgather_async``."""
        result: Tensor = self.allgather_async(tensor, name).wait()
        return result

    def alltoall_async(self, tensor: Tensor, splits: Tensor, name: str) -> Handle:
        """Send ``splits[j]`` (int32, on the host) elements to rank j; gives (received, in rank order; their splits)."""
        if self.size == 1:
            return Handle(None, (tensor, splits))
        kept = int(splits[self.rank])
        self.sent += (tensor.numel() - kept) * tensor.element_size()
        handle = hvd.alltoall_async(tensor, splits, name=f"{self._prefix}.{name}", process_set=self.process_set)
        return Handle(handle)

    def gather_objects(self, value: Any, name: str) -> list[Any]:
        """Every rank's ``value`` (picklable), in rank order, on every rank."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = self.allgather(torch.tensor([data.numel()]), f"{name}.length").tolist()
        parts = torch.split(self.allgather(data, f"{name}.data"), lengths)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def sparse_allreduce_async(self, tensor: Tensor, name: str, op: int) -> Callable[[], Tensor]:
        """Sum or average sparse COO tensors by allgather; call the result to wait for it."""
        if self.size == 1:
            return lambda: tensor
        tensor = tensor.coalesce()
        nbytes = tensor.indices().numel() * 8 + tensor.values().numel() * tensor.values().element_size()
        self.sent += (self.size - 1) * nbytes
        wait: Callable[[], Tensor] = hvd.sparse_allreduce_async(
            tensor, name=f"{self._prefix}.{name}", op=op, process_set=self.process_set
        )
        return wait
