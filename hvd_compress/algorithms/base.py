"""The interface of an algorithm: what is remembered between steps, and where the model is.

An algorithm object is a frozen description. ``attach`` makes its state for one bucket: a ``GradientState`` if
gradients are exchanged (in ``synchronize()``), an ``UpdateState`` if what the wrapped optimizer subtracted is
exchanged (in ``step()``).
"""

from __future__ import annotations

import abc
import math
from dataclasses import field
from typing import Any, Optional, Sequence, Union

from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import Combine, Compressor, Warmup
from hvd_compress.exchange import Context, Exchange, ExchangeSchedule

State = Union[GradientState, UpdateState]

# Per bucket of gradients: large enough that the latency of a collective does not count, small enough that
# the first buckets travel while backward still computes the others.
BUCKET_BYTES = 32 * 2**20
# A compressed bucket may be larger: below this payload a collective costs its latency, not its bytes.
PAYLOAD_BYTES = 2**20
# Horovod's counts of elements (of bytes, where payloads are gathered) must stay below 2^31. Payloads of 16-bit
# parameters may be twice what ``payload_ratio`` says, and a bucket is closed only after it is full.
BUCKET_LIMIT, PAYLOAD_LIMIT = 2.0**31, 2.0**29


def nonfinite_policy() -> Any:
    """Return the last field of an algorithm; not in its repr, so that checkpoints do not depend on it."""
    return field(default="propagate", repr=False)


class Algorithm(abc.ABC):
    """Base of all algorithms: frozen dataclasses, validated when built.

    Attributes:
        nonfinite: what an infinity or nan in a gradient leads to on every rank: "propagate", it is seen in ``p.grad``
            or in the model, as with Horovod; "raise", FloatingPointError; "skip", the step is left out.
    """

    nonfinite: str = "propagate"

    @property
    @abc.abstractmethod
    def exchanges_updates(self) -> bool:
        """True if the wrapped optimizer steps first, locally, and what it subtracted is exchanged."""

    @property
    def local_models(self) -> bool:
        """True if gradients are exchanged, and yet each rank trains a model of its own."""
        return False

    @property
    def local_steps(self) -> int:
        """Steps of the wrapped optimizer per exchange."""
        return 1

    @property
    def clip_norm(self) -> Optional[float]:
        """Norm to which the local gradients are clipped before they become momentum, or None."""
        return None

    @property
    def allreduce_only(self) -> bool:
        """True if nothing but allreduces is used, which is all that works once a rank has called ``hvd.join()``."""
        return True

    @abc.abstractmethod
    def choose(self, entry: ParamEntry) -> BucketAlgorithm:
        """Return the algorithm of one parameter."""

    def check(self, comm: Communicator) -> None:  # noqa: B027
        """Raise ValueError, alike on every rank, if this job cannot run the algorithm."""


class BucketAlgorithm(Algorithm):
    """Base of the algorithms of one bucket, of gradients or of updates; a Policy chooses among them."""

    @property
    def rescale_residual(self) -> bool:
        """True if the residual keeps its size in update units when the learning rate changes."""
        return True

    @property
    @abc.abstractmethod
    def bucket_bytes(self) -> float:
        """Bytes of parameters after which a bucket is closed."""

    def bucket_limit(self, ranks: int) -> float:
        """Return the bytes of parameters after which a bucket is closed in any case: Horovod counts in 32 bits."""
        return BUCKET_LIMIT

    @property
    @abc.abstractmethod
    def splits_groups(self) -> bool:
        """True if parameter groups get buckets of their own, as their learning rates matter."""

    def choose(self, entry: ParamEntry) -> BucketAlgorithm:
        return self

    @abc.abstractmethod
    def attach(self, bucket: Bucket, context: Context) -> State:
        """Return the state of this algorithm for ``bucket``; allocates all its buffers."""


class GradientAlgorithm(BucketAlgorithm):
    """Base of algorithms that exchange gradients before the wrapped optimizer steps.

    Attributes:
        compressor: what travels.
    """

    compressor: Compressor

    @property
    def exchanges_updates(self) -> bool:
        return False

    @property
    def bucket_bytes(self) -> float:
        return max(BUCKET_BYTES, PAYLOAD_BYTES / self.compressor.payload_ratio)

    def bucket_limit(self, ranks: int) -> float:
        return payload_limit(self.compressor, ranks)

    @property
    def allreduce_only(self) -> bool:
        return self.compressor.combine is not Combine.GATHER

    @property
    def splits_groups(self) -> bool:
        return True

    @abc.abstractmethod
    def attach(self, bucket: Bucket, context: Context) -> GradientState:
        """Return the state of this algorithm for ``bucket``; allocates all its buffers."""


class UpdateAlgorithm(BucketAlgorithm):
    """Base of algorithms that exchange what the wrapped optimizer has subtracted.

    A new one gives its arguments and ``make_exchange``; everything else is ``UpdateState``'s.
    """

    @property
    def exchanges_updates(self) -> bool:
        return True

    @property
    def masking(self) -> bool:
        """True if the wrapped optimizer's momentum is cleared where it was sent."""
        return False

    @property
    def bucket_bytes(self) -> float:
        return math.inf

    @property
    def splits_groups(self) -> bool:
        return not self.rescale_residual

    @abc.abstractmethod
    def make_exchange(self, bucket: Bucket, context: Context) -> Union[Exchange, ExchangeSchedule]:
        """Return how updates of ``bucket`` travel; allocates payloads."""

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        exchange = self.make_exchange(bucket, context)
        return UpdateState(bucket, context, exchange, self.rescale_residual, self.masking)


def payload_limit(compressor: Optional[Compressor], ranks: int, gathered: Optional[bool] = None) -> float:
    """Return the bytes of parameters whose payloads one collective can hold, with room for one more parameter.

    Args:
        compressor: None: payloads do not grow with the bucket.
        gathered: whether one rank receives the payloads of all; None: if the compressor's are not summed.
    """
    if compressor is None:
        return BUCKET_LIMIT
    if isinstance(compressor, Warmup):
        return min(payload_limit(stage, ranks, gathered) for stage in compressor.stages)
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
