"""The step check for overwritten parameters, on one rank; several ranks are in the multirank jobs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from hvd_compress.bucket import Bucket, FlatBuffer, ParamEntry
from hvd_compress.engine.replica_check import digest
from hvd_compress.engine.step_check import SAMPLES, StepCheck
from tests.unit.test_devices import StubCommunicator

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def point(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> FlatBuffer:
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    return Bucket("bucket", [ParamEntry(p, f"p{i}", 0) for i, p in enumerate(parameters)]).flat_buffer(dtype)


def recorded(*points: FlatBuffer) -> StepCheck:
    check = StepCheck(StubCommunicator(1))  # type: ignore[arg-type]
    check.record_parameters(points)
    return check


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_parameter_on_its_own(dtype: torch.dtype) -> None:
    points = point((40, 9), (0, 3), (), (5,), dtype=dtype), point((0,)), point((3,), (2, 2))
    check = recorded(*points)
    check.launch_check(points)
    assert check.overwritten(points) is None
    points[0].views[2].fill_(1)
    points[2].views[0][1] = 1
    check.launch_check(points)
    assert check.overwritten(points) == [[False, False, True, False], [False], [True, False]]
    check.record_parameters(points)
    points[0].views[0].fill_(torch.nan)
    check.launch_check(points)
    assert check.overwritten(points) == [[True, False, False, False], [False], [False, False]]
    check.record_parameters(points)
    check.launch_check(points)
    assert check.overwritten(points) is None, "NaN that stays where it was"


@given(st.integers(1, SAMPLES), st.data())
def test_of_a_small_parameter_every_element_is_seen(numel: int, data: st.DataObject) -> None:
    points = [point((3,), (numel,), (2,))]
    check = recorded(*points)
    points[0].views[1][data.draw(st.integers(0, numel - 1))] = 1
    check.launch_check(points)
    assert check.overwritten(points) == [[False, True, False]]


def test_new_buckets_count_as_rewritten_and_a_row_under_way_ends() -> None:
    points = [point((3,))]
    check = recorded(*points)
    check.launch_check(points)
    points.append(point((2,)))
    assert check.overwritten(points) is None, "launched before the second bucket was cut"
    check.launch_check(points)
    assert check.overwritten(points) == [[True], [True]]


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
