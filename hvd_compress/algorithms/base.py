"""What an algorithm is: what is remembered between steps, and where the model stands.

An algorithm object is a frozen description. ``attach`` makes its living part for one bucket: a
``GradientState`` if gradients are exchanged (in ``synchronize()``), an ``UpdateState`` if what the wrapped
optimizer subtracted is exchanged (in ``step()``).
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar, Optional, Sequence

from hvd_compress.algorithms.states import State
from hvd_compress.buckets import BUCKET_BYTES, Bucket, Entry
from hvd_compress.collectives import Link
from hvd_compress.compressors import Combine, Compressor, Warmup
from hvd_compress.exchange import Context


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

    @property
    def gathers(self) -> bool:
        """Whether anything but allreduces is used, which Horovod cannot do once a rank has called ``hvd.join()``."""
        compressor = getattr(self, "compressor", None)
        return isinstance(compressor, Compressor) and compressor.combine is Combine.GATHER

    @property
    def splits_groups(self) -> bool:
        """Whether parameter groups get buckets of their own, as their learning rates matter."""
        return not self.exchanges_updates or not getattr(self, "rescale_residual", True)

    def choose(self, entry: Entry) -> Algorithm:
        """The algorithm for one parameter: this one, unless it leaves some to another."""
        return self

    def check(self, link: Link) -> None:  # noqa: B027
        """Raise ValueError, alike on every rank, if this job cannot run the algorithm."""

    @abc.abstractmethod
    def attach(self, bucket: Bucket, context: Context) -> State:
        """The state of this algorithm for ``bucket``; allocates all its buffers."""


def require_compressor(owner: str, value: object) -> Compressor:
    """Raise ValueError unless ``value`` is a compressor."""
    if not isinstance(value, Compressor):
        raise ValueError(
            f"{owner}: compressor={value!r} is not allowed; it must be a compressor object such as "
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
    compressor = require_compressor(owner, value)
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
