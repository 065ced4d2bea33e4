"""Checks of user-given values; each failure is a ValueError naming the argument, the value and the range."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Sequence


def in_range(owner: str, argument: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise ValueError unless ``value`` is a real number in [low, high] (or (low, high] with ``low_open``)."""
    ok = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if ok:
        ok = (low < value if low_open else low <= value) and value <= high
    if not ok:
        bracket = "(" if low_open else "["
        allowed = f"{bracket}{low:g}, {high:g}]"
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be a number in {allowed}")


def density(owner: str, value: Any, argument: str = "density") -> None:
    """Raise ValueError unless ``value`` is a fraction of elements, 0 < density <= 1."""
    in_range(owner, f"{argument} (the fraction of elements sent)", value, 0.0, 1.0, low_open=True)


def integer(owner: str, argument: str, value: Any, low: int) -> None:
    """Raise ValueError unless ``value`` is an int >= ``low``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be an integer >= {low}")


def boolean(owner: str, argument: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be True or False")


def positive_or_none(owner: str, argument: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is None or a finite number > 0."""
    if value is not None and not _positive(value):
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be a number > 0, or None")


def positive(owner: str, argument: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number > 0."""
    if not _positive(value):
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be a finite number > 0")


def payload_size(owner: str, found: tuple[int, ...], dtype: Any, numel: int, wanted: Any) -> None:
    """Raise ValueError unless a payload's shape ``found`` is (numel,) and its dtype is ``wanted``."""
    if found != (numel,) or dtype != wanted:
        raise ValueError(
            f"{owner}: a payload of shape {tuple(found)} and dtype {dtype} is not allowed; it must have {numel} "
            f"elements of {wanted}"
        )


def _positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def one_of(owner: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of the strings ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"{owner}: {argument}={value!r} is not allowed; it must be one of {choices}")
