"""What an algorithm is: what is remembered between steps, and where the model stands.

An algorithm object is a frozen description. ``attach`` makes its living part for one bucket: a
``GradientState`` if gradients are exchanged (in ``synchronize()``), an ``UpdateState`` if what the wrapped
optimizer subtracted is exchanged (in ``step()``).
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Optional, Sequence

from hvd_compress.algorithms.bucket_state import State
from hvd_compress.bucket import BUCKET_BYTES, Bucket, ParamEntry
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import Combine, Compressor, Warmup
from hvd_compress.exchange import Context

# Horovod's counts of elements (of bytes, where payloads are gathered) must stay below 2^31. Payloads of 16-bit
# parameters may be twice what ``fraction`` says, and a bucket is closed only after it is full.
BUCKET_LIMIT, PAYLOAD_LIMIT = 2.0**31, 2.0**29


class Algorithm(abc.ABC):
    """Base of all algorithms: frozen dataclasses, validated when built.

    Attributes:
        exchanges_updates: False: gradients are exchanged before the wrapped optimizer steps; True: the
            wrapped optimizer steps first, locally, and what it subtracted is exchanged.
        local_models: gradients are exchanged, and yet each rank trains a model of its own.
    """

    exchanges_updates: ClassVar[bool] = False
    local_models: ClassVar[bool] = False
    local_steps: int = 1  # of the wrapped optimizer, per exchange
    clip_norm: Optional[float] = None  # of the local gradients, before they become momentum

    @property
    def bucket_bytes(self) -> float:
        """Bytes of parameters after which a bucket is closed."""
        return math.inf if self.exchanges_updates else BUCKET_BYTES

    def bucket_limit(self, ranks: int) -> float:
        """Bytes of parameters after which a bucket is closed in any case: Horovod counts in 32 bits."""
        return limit_for(getattr(self, "compressor", None), ranks)

    @property
    def gathers(self) -> bool:
        """Whether anything but allreduces is used, which Horovod cannot do once a rank has called ``hvd.join()``."""
        compressor = getattr(self, "compressor", None)
        return isinstance(compressor, Compressor) and compressor.combine is Combine.GATHER

    @property
    def splits_groups(self) -> bool:
        """Whether parameter groups get buckets of their own, as their learning rates matter."""
        return not self.exchanges_updates or not getattr(self, "rescale_residual", True)

    def choose(self, entry: ParamEntry) -> Algorithm:
        """The algorithm for one parameter: this one, unless it leaves some to another."""
        return self

    def check(self, comm: Communicator) -> None:  # noqa: B027
        """Raise ValueError, alike on every rank, if this job cannot run the algorithm."""

    @abc.abstractmethod
    def attach(self, bucket: Bucket, context: Context) -> State:
        """The state of this algorithm for ``bucket``; allocates all its buffers."""


def limit_for(compressor: Optional[Compressor], ranks: int, gathered: Optional[bool] = None) -> float:
    """Bytes of parameters whose payloads a collective can bring together, with room for the bucket's last parameter.

    Args:
        gathered: whether one rank receives the payloads of all; None: if the compressor's are not summed.
    """
    if compressor is None:
        return BUCKET_LIMIT
    if isinstance(compressor, Warmup):
        return min(limit_for(stage, ranks, gathered) for stage in compressor.stages)
    together = ranks if (compressor.combine is Combine.GATHER if gathered is None else gathered) else 1
    return min(BUCKET_LIMIT, PAYLOAD_LIMIT / (together * compressor.payload_ratio))


def require_compressor(owner: str, argument: str, value: object) -> Compressor:
    """Raise ValueError unless ``value`` is a compressor."""
    if not isinstance(value, Compressor):
        raise ValueError(
            f"{owner}: {argument}={value!r} is not allowed; it must be a compressor object such as "
            "hvd_compress.RandomBlock(density=1/64)"
        )
    return value


REFUSALS = {
    Combine.SKETCH: "decoding a sketch keeps too little for error feedback to converge; use GlobalSketch(sketch=...), "
    "which fetches the exact values of the coordinates it finds",
    Combine.JOINT: "its payload is made by all ranks together, so there is no server whose answer could be compressed "
    "again; use EF(...) or DEF(...)",
}


def require_combining(owner: str, argument: str, value: object, allowed: Sequence[Combine]) -> Compressor:
    """Raise ValueError, with the reason, unless ``value`` is a compressor whose payloads combine as ``allowed``."""
    compressor = require_compressor(owner, argument, value)
    if compressor.combine not in allowed:
        reason = REFUSALS.get(compressor.combine, "its payloads cannot be summed by an allreduce")
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; {reason}")
    return compressor


def require_constant(owner: str, argument: str, compressor: Compressor) -> None:
    """Raise ValueError if the size of the compressor's payload changes with the step."""
    if isinstance(compressor, Warmup):
        raise ValueError(
            f"{owner}: {argument}={compressor!r} is not allowed; shards are cut for one payload size. Warm up with "
            "EF(...) or DEF(...), or choose a constant density"
        )
