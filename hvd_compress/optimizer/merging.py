"""The states of all ranks made one that any number of ranks can load: what they had not sent is shared out evenly.

Every rank starts with the mean of the saved residuals, servers' errors included. The mean over the new ranks is then
what it was over the old ones, and the virtual iterate is where it was, whatever their numbers.
"""

from __future__ import annotations

from typing import Any, Iterable, Mapping, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.bucket_state import RESIDUAL_KINDS, SavedParameter
from hvd_compress.digest import digest
from hvd_compress.optimizer.saved_state import KEY, find_bucket, numbers_of, parts_of

_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state for ``load_state_dict`` on each of any number of ranks, made of the states of all old ranks.

    The pending updates, the momenta and other floating-point numbers of the wrapped optimizer, and with LIEC the local
    models are averaged over the old ranks; everything else is that of the first. Load the model that any of them has
    saved before. The states are used one after the other, so an iterator that reads files needs little memory.

    Args:
        states: what ``optimizer.state_dict()`` has returned on each rank of one job at one time, in the order of ranks.

    Raises:
        ValueError: if a state is missing, out of order, of another step or of another model.
    """
    merged: Optional[_Merge] = None
    for rank, state in enumerate(states):
        if merged is None:
            merged = _Merge(state)
        merged.add(state, rank)
    if merged is None:
        raise ValueError("merge_states: states is empty; give the state_dict() of every rank, in the order of ranks")
    return merged.finish()


class _Merge:
    """Sums over the states that have been added."""

    def __init__(self, first: Mapping[str, Any]) -> None:
        if first.get(KEY) is None:
            raise ValueError(f"merge_states: the state of rank 0 has no entry {KEY!r}; give optimizer.state_dict()")
        self._first, self._ours = first, first[KEY]
        self._size, self._count = int(first[KEY]["size"]), 0
        self._torch = _MeanOfTree(first["state"])
        self._buckets = [MergedBucket(bucket, self._size) for bucket in self._ours["buckets"]]

    def add(self, state: Mapping[str, Any], rank: int) -> None:
        """Add the state of ``rank``."""
        ours = state.get(KEY)
        expected = {"format": self._ours["format"], "rank": rank, "size": self._size, "step": self._ours["step"]}
        found = None if ours is None else {k: ours[k] for k in expected}
        if ours is None or found != expected:
            raise ValueError(
                f"merge_states: state {rank} should be of {expected}, and is of {found}; give the states that all "
                "ranks have saved at one time, in the order of ranks"
            )
        for bucket in self._buckets:
            bucket.add(ours["buckets"])
        self._torch.add(state["state"])
        self._count += 1

    def finish(self) -> dict[str, Any]:
        """Return the state of all ranks together."""
        if self._count != self._size:
            raise ValueError(f"merge_states: {self._count} states of a job of {self._size} ranks; give all of them")
        ours = {**self._ours, "rank": None, "owner": None, "buckets": [bucket.finish() for bucket in self._buckets]}
        ours["local_steps_done"] = 0
        return {**self._first, "state": self._torch.finish(), KEY: ours}


class MergedBucket:
    """The mean over ranks of what a bucket has not sent."""

    def __init__(self, bucket: Mapping[str, Any], ranks: int) -> None:
        self._first, self._ranks = bucket, ranks
        self._identity = {"algorithm": bucket["algorithm"], "names": bucket["names"]}
        self._pending: list[Optional[Tensor]] = [None] * len(bucket["names"])
        self._local: list[Optional[Tensor]] = [None] * len(bucket["names"])
        self._known: list[list[int]] = [[] for _ in bucket["names"]]

    def add(self, buckets: Sequence[Mapping[str, Any]]) -> None:
        """Add what a rank has saved of this bucket.

        Raises:
            ValueError: if it has none of the same parameters and algorithm.
        """
        bucket = find_bucket(self._identity, buckets)
        if bucket is None:
            raise ValueError(
                f"merge_states: ranks have saved other buckets; one has none with {self._identity['names'][:3]} of "
                f"{self._identity['algorithm']}"
            )
        parts, dtype = parts_of(bucket, self._ranks), _DTYPES[bucket["state"].get("dtype", "torch.float32")]
        for index, name in enumerate(bucket["names"]):
            part = parts[name]
            self._pending[index] = _added(self._pending[index], part.pending, self._ranks)
            if part.shared is None:
                self._local[index] = _added(self._local[index], part.local, self._ranks)
            else:
                self._known[index] += _digests(part, dtype)

    def finish(self) -> dict[str, Any]:
        """Return the bucket as any rank can load it."""
        state = self._first["state"]
        numbers = numbers_of(state)
        buffers = {k: v for k, v in state["buffers"].items() if k not in RESIDUAL_KINDS | {"local"}}
        if self._pending and all(p is not None for p in self._pending):
            buffers["residual"] = self._pending
        if self._local and all(p is not None for p in self._local):
            buffers["local"] = self._local
        if "has_unsent_local_steps" in numbers:
            numbers["has_unsent_local_steps"] = False
        return {**self._identity, "state": {**numbers, "buffers": buffers, "known": self._known}}


def _digests(part: SavedParameter, dtype: torch.dtype) -> list[int]:
    """Return digests of this rank's own point of a parameter and of the shared model, in the order of memory."""
    points = [point for point in (part.local, part.shared) if point is not None and point.numel()]
    return [int(digest(point.to(dtype).as_strided((point.numel(),), (1,)))) for point in points]


def _added(total: Optional[Tensor], value: Optional[Tensor], ranks: int) -> Optional[Tensor]:
    """Return ``total + value / ranks``, in float64: the mean of equal numbers is then that number."""
    if value is None:
        return total
    share = value.to(torch.float64) / ranks
    return share if total is None else total.add_(share)


class _MeanOfTree:
    """The mean of the floating-point tensors in nested dictionaries and lists; where all are equal, the first."""

    def __init__(self, first: Any) -> None:
        self._first = first
        self._sums: dict[tuple[Any, ...], Tensor] = {}
        self._count = 0

    def add(self, tree: Any) -> None:
        """Add the tensors of another tree of the same form."""
        firsts = dict(_tensors(self._first, ()))
        for path, value in _tensors(tree, ()):
            if path not in firsts or value.shape != firsts[path].shape:
                raise ValueError(f"merge_states: ranks have saved other states of the wrapped optimizer, at {path}")
            if path not in self._sums and not torch.equal(value, firsts[path]):
                self._sums[path] = firsts[path].to(torch.float64) * self._count
            if path in self._sums:
                self._sums[path] += value
        self._count += 1

    def finish(self) -> Any:
        """Return the first tree with the means where the trees differ."""
        return self._replaced(self._first, ())

    def _replaced(self, node: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(node, dict):
            return {k: self._replaced(v, (*path, k)) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(self._replaced(v, (*path, i)) for i, v in enumerate(node))
        if path in self._sums:
            return (self._sums[path] / self._count).to(node.dtype)
        return node


def _tensors(node: Any, path: tuple[Any, ...]) -> Iterable[tuple[tuple[Any, ...], Tensor]]:
    """Yield the floating-point tensors of a tree with their paths."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _tensors(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _tensors(value, (*path, index))
    elif isinstance(node, Tensor) and node.is_floating_point():
        yield path, node
