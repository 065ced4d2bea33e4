"""Which parameters travel together: buckets with the algorithm that a policy chooses, and sparse gradients apart."""

from __future__ import annotations

from typing import Iterable, Sequence, Union

from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.bucket_state import State
from hvd_compress.bucket import ParamEntry, build
from hvd_compress.comm.communicator import is_elastic
from hvd_compress.engine import sparse
from hvd_compress.exchange import Context

Groups = Union[int, Sequence[Sequence[Tensor]], None]
# What buckets are cut for in an elastic job: who joins later must cut as those did who were there.
ELASTIC_RANKS = 64


def teams_of(groups: Groups, parameters: Sequence[Parameter]) -> list[frozenset[int]]:
    """Disjoint sets of parameter ids to be exchanged together, from Horovod's ``groups``."""
    if groups is None:
        return []
    if not isinstance(groups, int):
        return [frozenset(id(p) for p in team) for team in groups if len(team)]
    n = min(groups, len(parameters))
    share, extra = divmod(len(parameters), n) if n else (0, 0)
    bounds = [k * share + min(k, extra) for k in range(n + 1)]
    return [frozenset(id(p) for p in parameters[a:b]) for a, b in zip(bounds, bounds[1:])]


class Partition:
    """Buckets of one optimizer with their states; only ever grows, so that indices stay valid.

    Attributes:
        states: one per bucket.
        sparse: parameters with sparse gradients, which are gathered instead.
        home: index of a parameter's bucket.
        place: its index within the bucket.
    """

    def __init__(self, algorithm: Algorithm, context: Context, groups: Groups, sparse_as_dense: bool) -> None:
        self._algorithm, self._context, self._groups = algorithm, context, groups
        # Updates are dense whatever the gradients. Buckets of local models are cut when a state is loaded, perhaps
        # on one rank only, and a joining elastic rank comes late: no time to agree.
        dense = algorithm.exchanges_updates or algorithm.local_models or sparse_as_dense
        self._finds_sparse = not (dense or is_elastic())
        self.states: list[State] = []
        self.sparse: list[Parameter] = []
        self.home: dict[Parameter, int] = {}
        self.place: dict[Parameter, int] = {}

    def extend(self, entries: Iterable[ParamEntry]) -> list[State]:
        """Cut buckets for the entries that have none and allocate their states, which are returned."""
        known = {id(p) for p in (*self.home, *self.sparse)}
        homeless = [entry for entry in entries if id(entry.parameter) not in known]
        found: list[Parameter] = []
        if self._finds_sparse:
            found = sparse.agree_sparse(self._context.comm, [entry.parameter for entry in homeless])
            apart = {id(p) for p in found}
            homeless = [entry for entry in homeless if id(entry.parameter) not in apart]
        by_algorithm: dict[Algorithm, list[ParamEntry]] = {}
        for entry in homeless:
            by_algorithm.setdefault(self._algorithm.choose(entry), []).append(entry)
        parameters = [entry.parameter for entry in homeless]
        teams = [] if self._algorithm.exchanges_updates else teams_of(self._groups, parameters)
        new: list[State] = []
        for algorithm, members in by_algorithm.items():
            new += self._attach(algorithm, members, teams, f"bucket{len(self.states)}.", len(self.states) + len(new))
        # All are there: none has been refused.
        for index, state in enumerate(new, len(self.states)):
            self.home.update((p, index) for p in state.bucket.parameters)
            self.place.update((p, i) for i, p in enumerate(state.bucket.parameters))
        self.states += new
        self.sparse += found
        return new

    def _attach(
        self,
        algorithm: Algorithm,
        members: Sequence[ParamEntry],
        teams: Sequence[frozenset[int]],
        prefix: str,
        first: int,
    ) -> list[State]:
        """States for ``members``, the first of them being number ``first`` of all."""
        limit = algorithm.bucket_limit(ELASTIC_RANKS if is_elastic() else self._context.comm.size)
        buckets = build(
            members,
            prefix=prefix,
            split_groups=algorithm.splits_groups,
            max_bytes=min(algorithm.bucket_bytes, limit),
            teams=teams,
            first=first,
        )
        return [algorithm.attach(bucket, self._context) for bucket in buckets]
