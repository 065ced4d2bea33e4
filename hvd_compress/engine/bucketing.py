"""The partition of parameters into buckets: which travel together, by which algorithm; sparse gradients apart."""

from __future__ import annotations

from typing import Iterable, Sequence, Union

from torch import Tensor
from torch.nn import Parameter

from hvd_compress.algorithms.base import Algorithm, BucketAlgorithm, State
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm.communicator import is_elastic
from hvd_compress.engine import sparse
from hvd_compress.exchange import Context

Groups = Union[int, Sequence[Sequence[Tensor]], None]
# Number of ranks that buckets are cut for in an elastic job: ranks that join later must cut as the first ones did.
ELASTIC_RANKS = 64
# Bytes; no kernel loads more at once.
ALIGNMENT = 256


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
        # on one rank only, and an elastic rank joins late: in these cases ranks cannot agree.
        dense = algorithm.exchanges_updates or algorithm.local_models or sparse_as_dense
        self._finds_sparse = not (dense or is_elastic())
        self.states: list[State] = []
        self.sparse: list[Parameter] = []
        self.home: dict[Parameter, int] = {}
        self.place: dict[Parameter, int] = {}

    def extend(self, entries: Iterable[ParamEntry]) -> list[State]:
        """Cut buckets for the entries that have none, allocate their states and return these."""
        known = {id(p) for p in (*self.home, *self.sparse)}
        homeless = [entry for entry in entries if id(entry.parameter) not in known]
        found: list[Parameter] = []
        if self._finds_sparse:
            found = sparse.agree_sparse(self._context.comm, [entry.parameter for entry in homeless])
            apart = {id(p) for p in found}
            homeless = [entry for entry in homeless if id(entry.parameter) not in apart]
        by_algorithm: dict[BucketAlgorithm, list[ParamEntry]] = {}
        for entry in homeless:
            by_algorithm.setdefault(self._algorithm.choose(entry), []).append(entry)
        parameters = [entry.parameter for entry in homeless]
        groups = [] if self._algorithm.exchanges_updates else groups_of(self._groups, parameters)
        new: list[State] = []
        for algorithm, members in by_algorithm.items():
            new += self._attach(algorithm, members, groups, f"bucket{len(self.states)}.", len(self.states) + len(new))
        # Only now, as no parameter has been refused.
        for index, state in enumerate(new, len(self.states)):
            self.home.update((p, index) for p in state.bucket.parameters)
            self.place.update((p, i) for i, p in enumerate(state.bucket.parameters))
        self.states += new
        self.sparse += found
        return new

    def _attach(
        self,
        algorithm: BucketAlgorithm,
        members: Sequence[ParamEntry],
        groups: Sequence[frozenset[int]],
        prefix: str,
        first: int,
    ) -> list[State]:
        """Return states for ``members``, the first of them being number ``first`` of all."""
        limit = algorithm.bucket_limit(ELASTIC_RANKS if is_elastic() else self._context.comm.size)
        buckets = cut_buckets(
            members,
            prefix=prefix,
            split_groups=algorithm.splits_groups,
            max_bytes=min(algorithm.bucket_bytes, limit),
            groups=groups,
            first=first,
        )
        return [algorithm.attach(bucket, self._context) for bucket in buckets]


def groups_of(groups: Groups, parameters: Sequence[Parameter]) -> list[frozenset[int]]:
    """Return disjoint sets of parameter ids to be exchanged together, from Horovod's argument ``groups``."""
    if groups is None:
        return []
    if not isinstance(groups, int):
        return [frozenset(id(p) for p in group) for group in groups if len(group)]
    n = min(groups, len(parameters))
    share, extra = divmod(len(parameters), n) if n else (0, 0)
    bounds = [k * share + min(k, extra) for k in range(n + 1)]
    return [frozenset(id(p) for p in parameters[a:b]) for a, b in zip(bounds, bounds[1:])]


def cut_buckets(
    entries: Iterable[ParamEntry],
    *,
    prefix: str,
    split_groups: bool,
    max_bytes: float,
    groups: Sequence[frozenset[int]] = (),
    first: int = 0,
) -> list[Bucket]:
    """Cut ``entries`` into buckets, last parameters first (the order in which backward reaches them).

    Args:
        entries: parameters in the optimizer's order.
        prefix: start of every bucket's name.
        split_groups: give parameter groups buckets of their own (they have learning rates of their own).
        max_bytes: close a bucket when it holds this much; parameters of one of ``groups`` are not cut.
        groups: disjoint sets of parameter ids to be kept together (Horovod's ``groups``).
        first: number of the first bucket.
    """
    group_of = {pid: k for k, group in enumerate(groups) for pid in group}
    open_buckets: dict[tuple[object, ...], list[ParamEntry]] = {}
    filled: dict[tuple[object, ...], float] = {}
    closed: list[list[ParamEntry]] = []
    for entry in reversed(list(entries)):
        p = entry.parameter
        group = group_of.get(id(p), -1)
        key = (group, p.device, p.dtype, entry.group if split_groups else -1)
        if group < 0 and filled.get(key, 0.0) >= max_bytes:
            closed.append(open_buckets.pop(key))
            filled[key] = 0.0
        open_buckets.setdefault(key, []).append(entry)
        filled[key] = filled.get(key, 0.0) + p.numel() * p.element_size()
    closed.extend(open_buckets.values())
    return [Bucket(f"{prefix}{i}", _aligned(members), i) for i, members in enumerate(closed, first)]


def _aligned(entries: Sequence[ParamEntry]) -> list[ParamEntry]:
    """Return the entries in the order in which they lie in a bucket's flat vector.

    On accelerators each begins at a multiple of the largest power of two that divides its own size. Kernels that load
    several elements at once need that: cuDNN's batch normalisation in channels_last fails on other addresses.
    """
    if entries[0].parameter.device.type == "cpu":
        return list(entries)
    nbytes = [entry.parameter.numel() * entry.parameter.element_size() for entry in entries]
    order = sorted(range(len(entries)), key=lambda i: -min(nbytes[i] & -nbytes[i], ALIGNMENT))
    return [entries[i] for i in order]
