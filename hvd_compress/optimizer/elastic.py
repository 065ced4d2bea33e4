"""Elastic jobs: what ranks have not sent yet survives a change of their number, also that of ranks which are gone.

As a state is committed, on all ranks, each keeps the mean of what they have not sent. After a change every rank goes on
with that mean, and newcomers get it from a rank that was there.
"""

from __future__ import annotations

import abc
import warnings
from typing import NamedTuple, Optional, cast

from torch import Tensor

from hvd_compress.algorithms.base import State
from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.comm.communicator import Sum, is_elastic, on_elastic_commit
from hvd_compress.engine.reducer import Reducer
from hvd_compress.optimizer.saved_state import parts_of

_LOST = (
    "hvd_compress: {gone} of {size} rank(s) have left since the last commit() of the elastic state, and what they had "
    "not sent is lost (this is rank {rank}); call commit() before hosts change"
)
_watching = False


class _Mean(NamedTuple):
    """The mean over ranks of what is pending in a bucket, and of local models (LIEC), flat; None if it has none."""

    pending: Optional[Tensor]
    model: Optional[Tensor]


class Wrapped(abc.ABC):  # noqa: B024 - their classes are registered as they are made
    """Every optimizer that ``DistributedOptimizer`` returns is an instance of this."""


class ElasticResiduals:
    """All ranks' residuals, as far as one optimizer keeps them."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._committed: list[_Mean] = []
        self._step = -1
        reducer.on_moved = self.share_out

    def commit(self) -> None:
        """Keep the mean over ranks of what they have not sent (collective; one or two dense allreduces)."""
        reducer, comm = self._reducer, self._reducer.comm
        # Newcomers that have not taken a step yet have no buckets.
        if not comm.member or comm.any_rank(not reducer.states or self._step == reducer.step):
            return
        found = [_Mean(_pending(state, comm.size), _local_model(state, comm.size)) for state in reducer.states]
        for state, mean in zip(reducer.states, found):
            self._add_up(state, mean)
        self._committed, self._step = found, reducer.step

    def share_out(self, former: Optional[int]) -> None:
        """Give all ranks the mean of what the former ranks have not sent (collective).

        Args:
            former: how many ranks there were at this rank's last step; None if it has just come.
        """
        reducer, comm = self._reducer, self._reducer.comm
        every = comm.gather_objects([former, self._step == reducer.step], "elastic")
        survivors = [rank for rank, (size, _) in enumerate(every) if size is not None]
        if not survivors:  # all ranks resume from a checkpoint
            return
        size, committed = every[survivors[0]]
        if not committed and size > len(survivors):
            warnings.warn(_LOST.format(gone=size - len(survivors), size=size, rank=comm.rank), stacklevel=2)
        sources = survivors[:1] if committed else survivors
        for index, state in enumerate(reducer.states):
            if committed and comm.rank in sources:
                mean = self._committed[index]
            else:
                mean = _Mean(_pending(state, size), _local_model(state, len(survivors)))
            if comm.rank not in sources:
                mean = _Mean(*(None if vector is None else vector.zero_() for vector in mean))
            self._add_up(state, mean)
            point = mean.model
            if isinstance(state, UpdateState):
                shared = cast(Tensor, state.shared_point(comm)).clone()
                point = comm.allreduce(shared if comm.rank == survivors[0] else shared.zero_(), _name(state, "x"), Sum)
            state.take_over(point, mean.pending)
        self._step = -1
        reducer.record_parameters()

    def _add_up(self, state: State, mean: _Mean) -> None:
        """Sum the ranks' contributions (collective)."""
        for kind, vector in mean._asdict().items():
            if vector is not None:
                self._reducer.comm.allreduce(vector, _name(state, kind), Sum)
        self._reducer.recorder.exclude_bytes()


def _name(state: State, kind: str) -> str:
    return f"{state.bucket.name}.elastic.{kind}"


def _pending(state: State, ranks: int) -> Optional[Tensor]:
    """Return this rank's part of the mean over ``ranks`` of what is pending, flat; None if nothing ever is."""
    bucket = state.bucket
    parts = parts_of({"names": bucket.layout.names, "state": state.state_dict()}, ranks)
    total = bucket.flat_buffer(bucket.state_dtype)
    for name, view in zip(bucket.layout.names, total.views):
        pending = parts[name].pending
        if pending is None:
            return None
        view.copy_(pending)
    return total.flat.div_(ranks)


def _local_model(state: State, ranks: int) -> Optional[Tensor]:
    """Return this rank's part of the mean of ``ranks`` local models, flat; None if ranks share a model."""
    return None if state.replica() else state.bucket.copy_of_params().div_(ranks)


def watch_commits() -> None:
    """Have elastic states keep residuals as they commit; called as the first optimizer of an elastic job is built."""
    global _watching
    if is_elastic() and not _watching:
        on_elastic_commit(Wrapped, lambda optimizer: optimizer._elastic.commit())
        _watching = True
