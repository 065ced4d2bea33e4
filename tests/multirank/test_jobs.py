"""Every check of every job file in ``jobs/``, at every number of ranks it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multirank import harness

CASES = harness.collect()


@pytest.mark.parametrize(
    ("path", "ranks", "launcher", "check"),
    CASES,
    ids=[f"{path.stem}-{check.removeprefix('check_')}-{launcher}{ranks}" for path, ranks, launcher, check in CASES],
)
def test_job(path: Path, ranks: int, launcher: str, check: str) -> None:
    harness.verify(path, ranks, launcher, check)
