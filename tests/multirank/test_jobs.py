"""Every check of every job file in ``jobs/``, at every number of ranks it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multirank import harness

CASES = [
    pytest.param(
        path,
        ranks,
        launcher,
        check,
        full,
        id=f"{path.stem}-{check.removeprefix('check_')}-{launcher}{ranks}",
        marks=[pytest.mark.full] if full else [],
    )
    for path, ranks, launcher, check, full in harness.collect()
]


@pytest.mark.parametrize(("path", "ranks", "launcher", "check", "full"), CASES)
def test_job(path: Path, ranks: int, launcher: str, check: str, full: bool) -> None:
    harness.verify(path, ranks, launcher, check, full)
