"""The interfaces count as many bytes as the papers' formulas say; `make volume` compares all methods."""

from __future__ import annotations

import pytest

from benchmarks import volume
from benchmarks.netlab import why_unavailable

REASON = why_unavailable()


@pytest.mark.full
@pytest.mark.skipif(REASON is not None, reason=f"a virtual cluster cannot be made here: {REASON}")
def test_interfaces_count_what_formulas_say() -> None:
    names = ["DistEF, 1 bit", "EF, top 1/1000", "gs-SGD, tree", "gTop-k, 1/1000"]
    records = volume.measure(3, names, timeout=300)
    assert [record["method"] for record in records] == names
    for record in records:
        # Headers and negotiation come on top of payloads of a few hundred kilobytes.
        assert 0.99 < record["counted"] / record["formula"] < 1.25, record
        assert record["stats"] == pytest.approx(record["formula"], rel=0.05), record
