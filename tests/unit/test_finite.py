"""Infinities and nan in vectors: found wherever they are, with compiled loops and without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress import DEF, EF, Dense, GlobalTopK, Policy, RandomBlock, native
from hvd_compress.finite import all_finite, nonfinite_flags, poison, take_out

BLOCK = RandomBlock(0.25)
BAD = (math.nan, math.inf, -math.inf)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@given(n=st.integers(1, 300), place=st.integers(0, 299), bad=st.sampled_from(BAD), dtype=st.sampled_from(DTYPES))
def test_one_bad_element_is_found(n: int, place: int, bad: float, dtype: torch.dtype) -> None:
    values = torch.full((n,), float(torch.finfo(dtype).max), dtype=dtype)  # whose sum and whose square overflow
    assert all_finite(values)
    values[place % n] = bad
    assert not all_finite(values)


@pytest.mark.parametrize("compiled", [True, False])
def test_large_vectors_in_threads(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "applies", lambda *_: False)
    values = torch.zeros(2**20 + 5)
    assert all_finite(values)
    for place in (0, 2**19, 2**20 + 4):
        values[place] = math.inf
        assert not all_finite(values)
        values[place] = 0.0


def test_only_what_is_bad_is_taken_out_and_flagged() -> None:
    flat = torch.arange(12, dtype=torch.float32)
    views = [flat[:5], flat[5:5], flat[5:]]
    assert take_out(flat, views).tolist() == [0.0, 0.0, 0.0]
    flat[7], flat[8] = math.nan, -math.inf
    assert take_out(flat, views).tolist() == [0.0, 0.0, 1.0]
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 9, 10, 11]
    poison(views, torch.tensor([0.0, 1.0, 3.0]))
    assert flat[:5].tolist() == [0, 1, 2, 3, 4]
    assert bool(torch.isnan(flat[5:]).all())
    assert nonfinite_flags(views).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("value", ["ignore", None, True, "Raise"])
def test_other_policies_are_refused(value: object) -> None:
    for make in (
        lambda: EF(BLOCK, nonfinite=value),  # type: ignore[arg-type]
        lambda: DEF(BLOCK, nonfinite=value),  # type: ignore[arg-type]
        lambda: Dense(nonfinite=value),  # type: ignore[arg-type]
        lambda: GlobalTopK(nonfinite=value),  # type: ignore[arg-type]
        lambda: Policy(Dense(), nonfinite=value),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            ValueError, match=r"nonfinite=.* is not allowed; it must be one of 'propagate', 'raise', 'skip'"
        ):
            make()


def test_a_policy_of_algorithms_decides_for_all() -> None:
    with pytest.raises(ValueError, match="give it to the Policy"):
        Policy(EF(BLOCK, nonfinite="raise"), dense_dims=1)
    assert Policy(EF(BLOCK), dense_dims=1, nonfinite="raise").nonfinite == "raise"


def test_the_repr_that_checkpoints_hold_does_not_depend_on_it() -> None:
    assert repr(EF(BLOCK, nonfinite="raise")) == repr(EF(BLOCK))
