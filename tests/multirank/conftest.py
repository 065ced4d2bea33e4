"""Tell the harness which jobs were selected, so that these can share launches."""

from __future__ import annotations

import pytest

from tests.multirank.support import harness
from tests.multirank.support.cases import Job


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect the jobs of the tests that will run."""
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    harness.select(p["job"] for p in parameters if isinstance(p.get("job"), Job))
