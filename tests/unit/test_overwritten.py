"""What a script has written into parameters: seen to the element, alike or not, put back; ranks are simulated."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.bucket import Bucket, FlatBuffer, ParamEntry
from hvd_compress.engine.overwritten import Overwritten, Written
from tests.unit.test_devices import StubCommunicator

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = ((4, 3), (0, 3), (), (5,))


def point(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> FlatBuffer:
    parameters = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    return Bucket("bucket", [ParamEntry(p, f"p{i}", 0) for i, p in enumerate(parameters)]).flat_buffer(dtype)


class Ranks:
    """Some ranks with one bucket each; ``find`` lets them ask together."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        self.points = [point(*SHAPES, dtype=dtype) for _ in range(count)]
        self.watches = [Overwritten(StubCommunicator(count)) for _ in range(count)]  # type: ignore[arg-type]
        self.place(0)

    def place(self, step: int) -> None:
        for watch, own in zip(self.watches, self.points):
            watch.record([own], step)
        self.placed = [own.flat.clone() for own in self.points]

    def seen(self) -> list[bool]:
        return [bool(watch.flags([own])[0]) for watch, own in zip(self.watches, self.points)]

    def find(self, step: int, known: bool = True) -> list[Written]:
        """Let each rank form its sums, and then find out with everyone's."""
        sums: list[Tensor] = []
        total: Optional[Tensor] = None

        def collect(tensor: Tensor, name: str, op: Any) -> Tensor:
            sums.append(tensor.clone())
            return tensor

        def answer(tensor: Tensor, name: str, op: Any) -> Tensor:
            assert total is not None
            return tensor.copy_(total)

        results: list[Written] = []
        for reply in (collect, answer):
            results = []
            for watch, own, before in zip(self.watches, self.points, self.placed):
                watch._comm.allreduce = reply  # type: ignore[method-assign, assignment]
                results.append(watch.find([own], [before if known else None], len(self.points), step))
            total = torch.stack(sums).sum(0)
        return results


def kinds(written: Written) -> list[str]:
    """Return "all", "some" or "none" for each parameter: what all ranks have written alike."""
    return ["some" if isinstance(a, Tensor) else "all" if a else "none" for a in written.alike[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_single_element_is_seen(dtype: torch.dtype, data: st.DataObject) -> None:
    ranks = Ranks(2, dtype)
    assert ranks.seen() == [False, False]
    total = ranks.points[0].flat.numel()
    ranks.points[1].flat[data.draw(st.integers(0, total - 1))] = data.draw(st.sampled_from([1.0, -0.0, float("nan")]))
    assert ranks.seen() == [False, True]
    ranks.place(1)
    assert ranks.seen() == [False, False], "also a nan that stays where it was"


def test_whole_parameters_written_alike() -> None:
    ranks = Ranks(3)
    for k, own in enumerate(ranks.points):
        own.flat.copy_(torch.arange(18.0) + k)  # each rank has a point of its own
    ranks.place(0)
    for own in ranks.points:
        own.views[0].fill_(7)
    for written in ranks.find(1):
        assert kinds(written) == ["all", "none", "none", "none"]
        assert not any(map(any, written.differing))
        assert not written.rolled_back


def test_the_root_of_a_broadcast_sees_no_change() -> None:
    ranks = Ranks(2)
    ranks.points[0].flat.fill_(3)
    ranks.place(0)
    ranks.points[1].views[3].copy_(ranks.points[0].views[3])
    assert ranks.seen() == [False, True]
    assert [kinds(written) for written in ranks.find(1)] == [["none", "none", "none", "all"]] * 2


def test_the_same_elements_of_different_points() -> None:
    ranks = Ranks(2)
    for k, own in enumerate(ranks.points):
        own.flat.copy_(torch.arange(18.0) + k)
    ranks.place(0)
    for own in ranks.points:
        own.views[0][1] = 50.0
    for written in ranks.find(1):
        assert kinds(written) == ["some", "none", "none", "none"]
        mask = written.alike[0][0]
        assert isinstance(mask, Tensor)
        assert mask.tolist() == [False] * 3 + [True] * 3 + [False] * 6


@pytest.mark.parametrize("how", ["other values", "other elements", "one rank only"])
def test_what_differs_is_each_ranks_own(how: str) -> None:
    ranks = Ranks(2)
    for k, own in enumerate(ranks.points):
        own.flat.copy_(torch.arange(18.0) + k)
    ranks.place(0)
    for k, own in enumerate(ranks.points):
        if how == "other values":
            own.views[3][2] = 1000.0 + k
        elif how == "other elements":
            own.views[3][2 + k] = 1000.0
        elif k:
            own.views[3][2] = 1000.0
    for written in ranks.find(1):
        assert kinds(written) == ["none"] * 4
        assert written.differing == [[False, False, False, True]]


def test_without_knowing_where_they_were_only_whole_parameters_count() -> None:
    ranks = Ranks(2)
    ranks.points[0].views[3][0] = 1.0
    for written in ranks.find(1, known=False):
        assert kinds(written) == ["all", "all", "all", "none"]
        assert written.differing == [[False, False, False, True]]


@pytest.mark.parametrize("ranks_with_points_of_their_own", [False, True])
def test_a_model_put_back(ranks_with_points_of_their_own: bool) -> None:
    ranks = Ranks(2)
    history: list[list[Tensor]] = []
    for step in range(1, 100):
        for k, own in enumerate(ranks.points):
            own.flat.fill_(step + 0.25 * k * ranks_with_points_of_their_own)
        ranks.place(step)
        history.append([own.flat.clone() for own in ranks.points])
    assert not any(written.rolled_back for written in ranks.find(99)), "where it is now"

    def put_back(saved: Sequence[Tensor]) -> list[bool]:
        for own, values in zip(ranks.points, saved):
            own.flat.copy_(values)
        return [written.rolled_back for written in ranks.find(99)]

    assert put_back(history[40]) == [True, True]
    assert put_back([history[40][0], history[41][1] + 0.5]) == [False, False]
    assert put_back([history[40][0], history[40][0]]) == [True, True], "one rank's is broadcast"
    assert put_back([history[98][0], history[98][0]]) == [False, False], "the present one is no earlier one"
    for watch in ranks.watches:
        watch.forget()
    assert put_back(history[40]) == [False, False]
