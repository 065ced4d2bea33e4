"""Every case of every check of every job file in ``jobs/``, at every number of ranks that the file asks for."""

from __future__ import annotations

import pytest

from tests.multirank.support import cases, harness
from tests.multirank.support.cases import Job

COLLECTED = harness.collect()
TESTS = [
    pytest.param(
        job,
        name,
        id=f"{job.file}-{name.removeprefix('check_')}-{job.launcher}{job.ranks}",
        marks=[pytest.mark.full] if marked else [],
    )
    for job, name, marked in COLLECTED
]


@pytest.mark.parametrize(("job", "name"), TESTS)
def test_job(job: Job, name: str) -> None:
    harness.verify(job, name)


@pytest.mark.parametrize("file", harness.files())
def test_every_check_is_part_of_a_job(file: str) -> None:
    """Guard against checks that ``@only`` or the numbers of ranks exclude everywhere, and against files without any."""
    written = cases.checks(Job(file, 1, "gloo", False).module())
    assert written
    possible = {name for name, check in written.items() if not cases.is_missing(check)}
    assert possible == {name.partition("[")[0] for job, name, _ in COLLECTED if job.file == file}
