"""A choice of algorithm for each parameter: by size, dimensions, name or parameter group."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Iterable, Mapping, Optional, Sequence, Union, cast

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm, BucketAlgorithm, nonfinite_policy
from hvd_compress.algorithms.dense import Dense
from hvd_compress.algorithms.detached_ef import dense_on_updates
from hvd_compress.bucket import ParamEntry
from hvd_compress.comm.communicator import Communicator
from hvd_compress.finite import require_policy

Choices = Union[Mapping[Any, Algorithm], Sequence[tuple[Any, Algorithm]]]


@dataclass(frozen=True)
class Policy(Algorithm):
    """A plan of several algorithms in one optimizer, chosen per parameter; the first rule that applies wins.

    1. ``patterns``: shell patterns on the parameter's name, in order;
    2. ``dense_below`` and ``dense_dims``: small tensors, and biases and norms (one dimension), go dense;
    3. ``groups``: by the index of the optimizer's parameter group;
    4. ``default``.

    All must exchange the same thing, gradients (EF, LIEC, Dense) or updates (DEF, DistEF, GlobalSketch,
    GlobalTopK); with the latter, ``Dense()`` means that updates are averaged uncompressed, which for SGD is
    the same.

    Args:
        default: for every parameter without a rule.
        dense_below: tensors of fewer elements go dense.
        dense_dims: tensors of at most so many dimensions go dense (1: biases and norms; 0: none but scalars).
        patterns: {pattern: algorithm} or (pattern, algorithm) pairs, such as ``{"*.bias": Dense()}``.
        groups: {index of the parameter group: algorithm} or pairs.
        nonfinite: "propagate", "raise" or "skip", for all parameters: see ``Algorithm``.

    Raises:
        ValueError: if a value is out of range, or algorithms cannot be combined.
    """

    default: Algorithm
    dense_below: int = 0
    dense_dims: int = -1
    patterns: Choices = ()
    groups: Choices = ()
    nonfinite: str = nonfinite_policy()

    def __post_init__(self) -> None:
        validation.integer("Policy", "dense_below", self.dense_below, 0)
        validation.integer("Policy", "dense_dims", self.dense_dims, -1)
        require_policy("Policy", self.nonfinite)
        for argument in ("patterns", "groups"):
            object.__setattr__(self, argument, _pairs(argument, getattr(self, argument)))
        self._check("default", self.default)
        for argument, rules in (("patterns", self._patterns), ("groups", self._groups)):
            for key, algorithm in rules:
                self._check(f"{argument}[{key!r}]", algorithm)

    def _check(self, argument: str, algorithm: object) -> None:
        if not isinstance(algorithm, Algorithm) or isinstance(algorithm, Policy):
            raise ValueError(
                f"Policy: {argument}={algorithm!r} is not allowed; it must be an algorithm such as EF(...), Dense()"
            )
        if algorithm.nonfinite not in ("propagate", self.nonfinite):
            raise ValueError(
                f"Policy: {argument}={algorithm!r} has nonfinite={algorithm.nonfinite!r}; give it to the Policy, as it "
                "is for all parameters"
            )
        if isinstance(algorithm, Dense):
            return
        if algorithm.exchanges_updates != self.default.exchanges_updates:
            kinds = {True: "updates, after the local step", False: "gradients, before it"}
            raise ValueError(
                f"Policy: {argument}={algorithm!r} cannot be combined with default={self.default!r}: one exchanges "
                f"{kinds[algorithm.exchanges_updates]}, the other {kinds[self.default.exchanges_updates]}"
            )
        if algorithm.local_steps != self.default.local_steps:
            raise ValueError(
                f"Policy: {argument}={algorithm!r} has local_steps={algorithm.local_steps}, default={self.default!r} "
                f"{self.default.local_steps}; they must be equal, as all parameters are exchanged together"
            )
        if algorithm.clip_norm not in (None, self.default.clip_norm):
            raise ValueError(
                f"Policy: {argument}={algorithm!r} has clip_norm={algorithm.clip_norm}, default={self.default!r} "
                f"{self.default.clip_norm}; give it to the default, as the norm of all gradients together is clipped"
            )

    @property
    def _patterns(self) -> Sequence[tuple[str, Algorithm]]:
        return cast("Sequence[tuple[str, Algorithm]]", self.patterns)

    @property
    def _groups(self) -> Sequence[tuple[int, Algorithm]]:
        return cast("Sequence[tuple[int, Algorithm]]", self.groups)

    @property
    def _algorithms(self) -> tuple[Algorithm, ...]:
        return (self.default, *(a for _, a in (*self._patterns, *self._groups)))

    @property
    def exchanges_updates(self) -> bool:
        return self.default.exchanges_updates

    @property
    def local_steps(self) -> int:
        return self.default.local_steps

    @property
    def clip_norm(self) -> Optional[float]:
        return self.default.clip_norm

    @property
    def allreduce_only(self) -> bool:
        return all(a.allreduce_only for a in self._algorithms)

    @property
    def local_models(self) -> bool:
        return any(a.local_models for a in self._algorithms)

    def choose(self, entry: ParamEntry) -> BucketAlgorithm:
        parameter = entry.parameter
        for pattern, algorithm in self._patterns:
            if fnmatchcase(entry.name, pattern):
                return self._choose_of(algorithm, entry)
        if parameter.numel() < self.dense_below or parameter.dim() <= self.dense_dims:
            return self._choose_of(Dense(), entry)
        for index, algorithm in self._groups:
            if entry.group == index:
                return self._choose_of(algorithm, entry)
        return self.default.choose(entry)

    def _choose_of(self, algorithm: Algorithm, entry: ParamEntry) -> BucketAlgorithm:
        """Return what ``algorithm`` chooses; ``Dense`` among algorithms of updates averages updates."""
        if isinstance(algorithm, Dense) and self.exchanges_updates:
            return dense_on_updates(self.local_steps, algorithm.compressor)
        return algorithm.choose(entry)

    def check(self, comm: Communicator) -> None:
        for algorithm in self._algorithms:
            algorithm.check(comm)


def _pairs(argument: str, value: Any) -> tuple[tuple[Any, Any], ...]:
    """Return the (key, algorithm) pairs of ``patterns`` or ``groups``.

    Raises:
        ValueError: if they are no pairs, or a key is of the wrong kind.
    """
    items = tuple(value.items() if isinstance(value, Mapping) else value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise ValueError(
            f"Policy: {argument}={value!r} is not allowed; it must be a dict {{key: algorithm}}, or such pairs"
        )
    pairs = tuple((key, algorithm) for key, algorithm in items)
    if argument == "patterns" and not all(isinstance(key, str) for key, _ in pairs):
        raise ValueError(f"Policy: patterns={value!r} is not allowed; its keys must be strings")
    for key, _ in pairs if argument == "groups" else ():
        validation.integer("Policy", "groups: the key", key, 0)
    return pairs
