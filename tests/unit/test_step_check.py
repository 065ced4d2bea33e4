"""The check of a step: numbers that are equal on all ranks, ranks that are missing; digests."""

from __future__ import annotations

from typing import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress.digest import digest
from hvd_compress.engine.step_check import StepCheck, Verdict
from tests.unit.test_devices import StubCommunicator

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
numbers = st.lists(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2), min_size=1, max_size=5)


def together(ranks: Sequence[Sequence[int]], scaled: Sequence[bool] = (), joined: int = 0) -> list[Verdict]:
    """Return the verdict of each rank, besides which some have joined."""
    checks = []
    for k, own in enumerate(ranks):
        check = StepCheck(StubCommunicator(len(ranks) + joined))  # type: ignore[arg-type]
        check.launch(own, bool(scaled) and scaled[k], k == 0, k == 1)
        checks.append(check)
    rows = [check._row for check in checks]
    total = torch.stack([row for row in rows if row is not None]).sum(0)
    for row in rows:
        assert row is not None
        row.copy_(total)
    return [check.finish() for check in checks]


@given(numbers, st.integers(0, 3))
def test_numbers_are_compared_exactly(ranks: list[list[int]], joined: int) -> None:
    expected = tuple(len({own[i] for own in ranks}) == 1 for i in range(2))
    for verdict in together(ranks, joined=joined):
        assert verdict.equal == expected
        assert verdict.present == len(ranks)
        assert verdict.written == (len(ranks) > 1)


def test_a_single_bit_is_seen_among_many_ranks() -> None:
    for bit in (0, 20, 21, 41, 42, 62):
        ranks = [[2**62 + 5]] * 1000 + [[(2**62 + 5) ^ (1 << bit)]]
        assert together(ranks)[0].equal == (False,)
    assert together([[2**63 - 1]] * 2000)[0].equal == (True,)


def test_one_rank_that_scales_is_enough() -> None:
    assert [v.scaled for v in together([[1], [1]], scaled=(False, True))] == [True, True]
    assert [v.scaled for v in together([[1], [1]])] == [False, False]


def test_a_check_ends_once() -> None:
    check = StepCheck(StubCommunicator(1))  # type: ignore[arg-type]
    assert not check.launched
    assert not check.arrived
    check.launch([3])
    assert check.launched
    assert check.arrived
    assert check.finish() == Verdict(1, (True,), False, False, False)
    assert not check.launched
    check.launch([3])
    check.forget(wait=True)
    assert not check.launched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 7, 2**16, 2**17 + 5])
def test_a_digest_depends_on_every_element_and_on_order(dtype: torch.dtype, numel: int) -> None:
    values = torch.zeros(numel, dtype=dtype)
    seen = {int(digest(values))}
    for index in {0, numel // 2, numel - 1}:
        for value in (1.0, 2.0, -2.0, 7.0):
            changed = values.clone()
            changed[index] = value
            seen.add(int(digest(changed)) & (2**63 - 1))
    assert len(seen) == 1 + 4 * len({0, numel // 2, numel - 1})
    assert int(digest(values[:0])) == 0


@pytest.mark.parametrize("numel", [1, 5, 2**16 - 1, 2**16, 2**17 + 3])
def test_compiled_loops_give_the_same_digest(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    monkeypatch.setattr("hvd_compress.native.GRAIN", 1000)
    compiled = int(digest(values))
    monkeypatch.setattr("hvd_compress.native._kernels", None)
    assert int(digest(values)) == compiled
