"""The cases of checks: names, combinations, jobs, and the failure of a check that has lost its cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_compress import DEF, EF, Dense, Policy, RandomBlock, TopK
from tests.multirank.support.cases import Job, PerJob, by_mpi, calls, cases, name_of, several_ranks

QUICK = Job("none", 2, "gloo", False)
FULL = Job("none", 2, "gloo", True)


def collected(check: Any, job: Job = QUICK) -> list[str]:
    """Return the names of a check's cases."""
    check.__name__ = "check_it"
    return list(calls(SimpleNamespace(check_it=check), job))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (EF(RandomBlock(density=0.25)), "EF(RandomBlock(0.25))"),
        (DEF(TopK(0.1), 0.0, masking=True), "DEF(TopK(0.1), coefficient=0.0, masking=True)"),
        (Policy(EF(TopK()), patterns={"*bias": Dense()}), "Policy(EF(TopK()), patterns=[[*bias, Dense()]])"),
        (torch.optim.Adam, "Adam"),
        (torch.float64, "float64"),
        ((2, None), "[2, None]"),
    ],
)
def test_names_leave_out_defaults(value: Any, name: str) -> None:
    assert name_of(value) == name


def test_values_and_axes() -> None:
    @cases(PerJob(lambda job: ("a", "b") if job.full else ("a",)), "a", {"named": 3})
    def single(value: Any) -> None: ...

    assert collected(single) == ["check_it[a]", "check_it[named]"]
    assert collected(single, FULL) == ["check_it[a]", "check_it[b]", "check_it[named]"]

    @cases(one=("a", "b"), two=(1, 2), where=lambda one, two: (one, two) != ("a", 2))
    def combined(one: str, two: int) -> None: ...

    assert collected(combined) == ["check_it[a, two=1]", "check_it[b, two=1]", "check_it[b, two=2]"]


def test_calls_pass_the_case() -> None:
    seen: list[Any] = []

    @cases(one=("a",), two=(1, 2))
    def check(one: str, two: int) -> None:
        seen.append((one, two))

    for call in calls(SimpleNamespace(check_it=check), QUICK).values():
        call()
    assert seen == [("a", 1), ("a", 2)]


def test_checks_of_other_jobs_are_left_out() -> None:
    @by_mpi
    @several_ranks
    def check() -> None: ...

    assert collected(check) == collected(check, Job("none", 1, "mpi", True)) == []
    assert collected(check, Job("none", 2, "mpi", True)) == ["check_it"]


def test_a_check_without_cases_fails() -> None:
    @cases(PerJob(lambda job: ()))
    def check(value: Any) -> None: ...

    assert collected(check) == ["check_it[]"]
    with pytest.raises(AssertionError, match="no case"):
        calls(SimpleNamespace(check_it=check), QUICK)["check_it[]"]()


def test_equal_names_of_different_values_are_an_error() -> None:
    @cases("1", {"1": 1})
    def check(value: Any) -> None: ...

    with pytest.raises(ValueError, match="two cases are named 1"):
        collected(check)
