"""What an exchange is: how the payload of one bucket travels and comes back as an aggregate over ranks."""

from __future__ import annotations

import abc
import time
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Average, Communicator
from hvd_compress.compressors.base import pieces
from hvd_compress.telemetry import Recorder


class Reduction(NamedTuple):
    """How ranks are combined, in Horovod's terms.

    Attributes:
        op: Average or Sum.
        predivide: Horovod's ``gradient_predivide_factor``: divide by it before the sum, multiply after.
    """

    op: int = Average
    predivide: float = 1.0


def _stateless(parameter: Parameter) -> dict[str, Any]:
    return {}


class Context(NamedTuple):
    """What the optimizer lends to the state of a bucket and to its exchange.

    Attributes:
        state_of: the wrapped optimizer's state of a parameter, as it is now (may be empty).
    """

    comm: Communicator
    reduction: Reduction
    recorder: Recorder
    state_of: Callable[[Parameter], dict[str, Any]] = _stateless

    @property
    def averages(self) -> bool:
        """Whether the aggregate is the ranks' mean (else their sum)."""
        return bool(self.reduction.op == Average)


def require_countable(bucket: Bucket, what: str, count: int) -> None:
    """Raise ValueError if a collective would bring together more than Horovod, which has 32 bits, can count.

    Args:
        count: elements that are summed, or bytes that are gathered from all ranks.
    """
    if count >= 2**31:
        raise ValueError(
            f"the {what} of parameters {bucket.layout.names[0]!r} to {bucket.layout.names[-1]!r} would bring together "
            f"{count} elements or bytes on each rank, and Horovod counts to {2**31 - 1}; choose a smaller density, or "
            "a compressor whose payloads are summed, such as RandomBlock"
        )


class Exchange(abc.ABC):
    """One-way compression: every rank sends its payload, every rank gets the aggregate.

    A step calls ``begin``, ``encode``, ``launch``, ``answer``, ``wait``, then what it needs of the rest. Until ``wait``
    has returned nothing has changed but buffers of the exchange: a failed collective loses nothing.
    """

    def __init__(self, bucket: Bucket, context: Context) -> None:
        self.bucket, self.context = bucket, context
        self._aggregate: Optional[Tensor] = None

    @abc.abstractmethod
    def set_step(self, step: int) -> None:
        """Draw what step ``step`` needs; host work only."""

    @abc.abstractmethod
    def encode(self, flat: Tensor) -> None:
        """Form this rank's payload of ``flat``, which must stay as it is until ``wait`` has returned."""

    @abc.abstractmethod
    def launch(self) -> None:
        """Send the payload."""

    def next_round(self) -> None:  # noqa: B027
        """All buckets have been launched: take what has arrived and send what depends on it, if there are rounds."""

    def wait(self) -> None:
        """Wait until the aggregate is there.

        Raises:
            HorovodInternalError: if a peer has failed.
        """
        begin = time.perf_counter()
        self.receive()
        self.context.recorder.wait_seconds(time.perf_counter() - begin)

    def drain(self) -> None:
        """Wait for what has been launched and make no use of it."""
        self.next_round()
        self.receive()

    @abc.abstractmethod
    def receive(self) -> None:
        """``wait``, without the clock."""

    @abc.abstractmethod
    def subtract_sent(self, residual: Tensor) -> None:
        """``residual -=`` what this rank has given away: it is no longer owed."""

    @abc.abstractmethod
    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        """``target += alpha *`` the aggregate; the same bits on every rank."""

    def write_aggregate(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Write ``scale *`` the aggregate into a bucket's flattened tensors, which hold zeros."""
        layout = self.bucket.layout
        if self._aggregate is None:
            self._aggregate = torch.zeros(layout.total, dtype=self.bucket.state_dtype, device=self.bucket.device)
        else:
            self._aggregate.zero_()
        self.add_aggregate(self._aggregate, scale)
        torch._foreach_copy_(list(tensors), list(pieces(self._aggregate, layout.numels)))

    def clear(self, flat: Tensor) -> None:
        """Set the coordinates that this rank has sent to zero (compressors that select coordinates)."""
        raise NotImplementedError(f"{type(self).__name__} does not know which coordinates were sent")

    def warm_start(self) -> dict[str, FlatBuffer]:
        """What the compressor carries from step to step, the same on every rank, by kind."""
        return {}
