"""The bytes that ``stats()`` reports are those that the network interfaces count."""

from __future__ import annotations

import pytest

from benchmarks import check_bytes
from benchmarks.netlab import why_unavailable

REASON = why_unavailable()


@pytest.mark.skipif(REASON is not None, reason=f"a virtual cluster cannot be made here: {REASON}")
@pytest.mark.parametrize("hosts", [*(pytest.param(n, marks=pytest.mark.full) for n in (2, 3)), 4])
def test_stats_agree_with_the_interfaces(hosts: int) -> None:
    comparisons = check_bytes.compare(hosts, steps=3)
    assert {c.method for c in comparisons} == {"dense", "ef", "def"}
    assert len(comparisons) == 3 * hosts
    for comparison in comparisons:
        assert comparison.agrees, f"{comparison}: {comparison.difference:+.1%}"
