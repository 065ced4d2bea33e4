"""Buckets: every parameter once, in the right company; flat mirrors that keep shapes, strides and values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.compressors import Layout
from hvd_compress.engine.bucketing import cut_buckets, groups_of

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
DEVICES = ["cpu", "cpu", "cpu", "meta"]
INF = float("inf")


def entry(
    name: str, numel: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu", group: int = 0
) -> ParamEntry:
    return ParamEntry(Parameter(torch.zeros(numel, dtype=dtype, device=device)), name, group)


def names(buckets: list[Bucket]) -> list[list[str]]:
    return [[e.name for e in bucket.entries] for bucket in buckets]


@st.composite
def models(draw: Any) -> tuple[list[ParamEntry], list[frozenset[int]]]:
    """Parameters of all kinds, some of them in kept."""
    kinds = draw(
        st.lists(
            # Most of one kind, so that buckets fill.
            st.tuples(
                st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 16, 64, 100]),
                st.sampled_from(DTYPES),
                st.sampled_from(DEVICES),
                st.sampled_from([0, 0, 1]),
                st.sampled_from([-1, -1, -1, 0, 1]),
            ),
            min_size=1,
            max_size=25,
        )
    )
    entries = [entry(f"p{i}", n, dtype, device, group) for i, (n, dtype, device, group, _) in enumerate(kinds)]
    members = [[id(e.parameter) for e, kind in zip(entries, kinds) if kind[4] == team] for team in range(2)]
    return entries, [frozenset(ids) for ids in members if ids]


# -- cut_buckets ---------------------------------------------------------------------------------------


@given(models(), st.booleans(), st.sampled_from([1, 16, 40, 1000, INF]))
def test_every_rule_of_cutting(
    model: tuple[list[ParamEntry], list[frozenset[int]]], split_groups: bool, max_bytes: float
) -> None:
    entries, kept = model
    buckets = cut_buckets(entries, prefix="b7.", split_groups=split_groups, max_bytes=max_bytes, groups=kept)
    position = {id(e.parameter): i for i, e in enumerate(entries)}
    team_of = {pid: k for k, team in enumerate(kept) for pid in team}

    # every parameter exactly once, names that do not depend on anything else
    assert sorted(position[id(p)] for b in buckets for p in b.parameters) == list(range(len(entries)))
    assert [b.name for b in buckets] == [f"b7.{i}" for i in range(len(buckets))]

    by_kind: dict[Any, list[Bucket]] = {}
    for bucket in buckets:
        kinds = {
            (p.dtype, p.device, e.group if split_groups else None, team_of.get(id(p)))
            for e, p in zip(bucket.entries, bucket.parameters)
        }
        assert len(kinds) == 1, "one dtype, device, team and (if asked for) parameter group"
        assert (bucket.dtype, bucket.device) == (bucket.parameters[0].dtype, bucket.parameters[0].device)
        assert bucket.layout == (
            tuple(e.name for e in bucket.entries),
            tuple(e.parameter.numel() for e in bucket.entries),
            tuple(tuple(e.parameter.shape) for e in bucket.entries),
        )
        assert bucket.state_dtype == (torch.float64 if bucket.dtype == torch.float64 else torch.float32)
        # last parameters first, on accelerators those of one alignment
        order = [position[id(p)] for p in bucket.parameters]
        nbytes = [p.numel() * p.element_size() for p in bucket.parameters]
        alignments = [1 if bucket.device.type == "cpu" else math.gcd(n, 256) if n else 0 for n in nbytes]
        assert list(zip(alignments, order)) == sorted(zip(alignments, order), reverse=True)
        assert all(sum(nbytes[:i]) % (alignment or 1) == 0 for i, alignment in enumerate(alignments))
        by_kind.setdefault(kinds.pop(), []).append(bucket)

    for kind, alike in by_kind.items():
        in_team = kind[-1] is not None
        assert not in_team or len(alike) == 1, "a team of one kind is not cut"
        for bucket in alike if not in_team else []:
            found = sorted(bucket.parameters, key=lambda p: -position[id(p)])
            sizes = [p.numel() * p.element_size() for p in found]
            assert sum(sizes[:-1]) < max_bytes, "closed as soon as it is full"
            assert bucket is alike[-1] or sum(sizes) >= max_bytes, "and not before"
        firsts = [max(position[id(p)] for p in b.parameters) for b in alike]
        assert firsts == sorted(firsts, reverse=True)


def test_a_small_example() -> None:
    entries = [entry(name, 4) for name in "abcde"]
    assert names(cut_buckets(entries, prefix="", split_groups=True, max_bytes=INF)) == [["e", "d", "c", "b", "a"]]
    assert names(cut_buckets(entries, prefix="", split_groups=True, max_bytes=32)) == [["e", "d"], ["c", "b"], ["a"]]
    assert names(cut_buckets(entries, prefix="", split_groups=True, max_bytes=1)) == [["e"], ["d"], ["c"], ["b"], ["a"]]
    wide = [entry(name, 4, torch.float64) for name in "abc"]
    assert names(cut_buckets(wide, prefix="", split_groups=True, max_bytes=32)) == [["c"], ["b"], ["a"]]
    kept = [frozenset(id(entries[i].parameter) for i in (0, 2, 4))]
    cut = names(cut_buckets(entries, prefix="", split_groups=True, max_bytes=1, groups=kept))
    assert sorted(cut) == [["b"], ["d"], ["e", "c", "a"]]
    assert cut_buckets([], prefix="", split_groups=True, max_bytes=1) == []


def test_parameter_groups_share_a_bucket_only_if_allowed() -> None:
    entries = [entry("a", group=0), entry("b", group=1), entry("c", group=0)]
    assert sorted(names(cut_buckets(entries, prefix="", split_groups=True, max_bytes=INF))) == [["b"], ["c", "a"]]
    (joint,) = cut_buckets(entries, prefix="", split_groups=False, max_bytes=INF)
    assert len(joint.parameters) == 3


@given(st.integers(0, 12), st.integers(1, 15))
def test_a_number_of_groups_cuts_evenly_and_in_order(count: int, groups: int) -> None:
    parameters = [Parameter(torch.zeros(1)) for _ in range(count)]
    kept = groups_of(groups, parameters)
    assert len(kept) == min(groups, count)
    sizes = [len(team) for team in kept]
    assert not sizes or max(sizes) - min(sizes) <= 1
    where = [k for p in parameters for k, team in enumerate(kept) if id(p) in team]
    assert len(where) == count, "each parameter in exactly one"
    assert where == sorted(where)


# -- mirrors -------------------------------------------------------------------------------------------


def channels_last() -> Tensor:
    return torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)


SHAPED: dict[str, Any] = {
    "matrix": lambda: torch.randn(3, 4),
    "channels_last": channels_last,
    "one_channel": lambda: torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "scalar": lambda: torch.randn(()),
    "one_element": lambda: torch.randn(1, 1),
    "empty": lambda: torch.randn(0, 3),
    "empty_behind": lambda: torch.randn(3, 0),
    "empty_vector": lambda: torch.randn(0),
    "with_gaps": lambda: torch.randn(6, 8)[::2, 1:4],
    "offset": lambda: torch.randn(20)[7:],
}
KEEPS_STRIDES = set(SHAPED) - {"with_gaps"}


def bucket_of(*kinds: str, dtype: torch.dtype = torch.float32) -> Bucket:
    torch.manual_seed(0)
    return Bucket("b", [ParamEntry(Parameter(SHAPED[kind]().to(dtype)), kind, 0) for kind in kinds])


@pytest.mark.parametrize("kind", SHAPED)
def test_a_view_looks_like_its_parameter(kind: str) -> None:
    bucket = bucket_of("matrix", kind, "offset")
    parameter, mirror = bucket.parameters[1], bucket.flat_buffer(torch.float32)
    view = mirror.views[1]
    assert view.shape == parameter.shape
    if kind in KEEPS_STRIDES:
        assert view.stride() == parameter.stride()
    else:
        assert view.is_contiguous()


def test_views_cover_the_flat_vector_without_overlap() -> None:
    bucket = bucket_of(*SHAPED)
    mirror = bucket.flat_buffer(torch.float32)
    assert int(torch.count_nonzero(mirror.flat)) == 0
    assert mirror.flat.is_contiguous()
    assert mirror.flat.numel() == bucket.layout.total == sum(p.numel() for p in bucket.parameters)
    for i, view in enumerate(mirror.views):
        assert view.numel() == 0 or view.untyped_storage().data_ptr() == mirror.flat.untyped_storage().data_ptr()
        view += i + 1
    expected = [i + 1.0 for i, numel in enumerate(bucket.layout.numels) for _ in range(numel)]
    assert mirror.flat.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_mirrors_may_have_another_dtype(dtype: torch.dtype) -> None:
    mirror = bucket_of("channels_last", "scalar").flat_buffer(dtype)
    assert [v.dtype for v in (mirror.flat, *mirror.views)] == [dtype] * 3


def test_adopt_keeps_values_and_moves_storage() -> None:
    bucket = bucket_of(*SHAPED)
    parameters, mirror = list(bucket.parameters), bucket.flat_buffer(bucket.dtype)
    values = [p.detach().clone() for p in parameters]
    parameters[0].grad = torch.ones_like(parameters[0])
    bucket.move_params_to(mirror)
    for parameter, value, view in zip(parameters, values, mirror.views):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == view.data_ptr()
        assert (parameter.is_leaf, parameter.requires_grad) == (True, True)
    assert all(p is q for p, q in zip(bucket.parameters, parameters))
    assert torch.equal(parameters[0].grad, torch.ones(3, 4))

    # one vector now: what is written to one is read in the other
    mirror.flat.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in parameters)
    with torch.no_grad():
        parameters[-1].fill_(5.0)
    assert int((mirror.flat == 5.0).sum()) == parameters[-1].numel()


@pytest.mark.parametrize("kind", SHAPED)
def test_the_layout_has_the_shape_in_memory(kind: str) -> None:
    """A piece of the flat vector seen as a matrix must have rows and columns of the parameter, not a mixture."""
    bucket = bucket_of("matrix", kind)
    parameter, mirror = bucket.parameters[1].detach(), bucket.flat_buffer(torch.float32)
    mirror.views[1].copy_(parameter)
    shape = bucket.layout.shapes[1]
    rows = mirror.flat[12:].view(shape)
    if kind == "channels_last":
        assert torch.equal(rows, parameter.permute(0, 2, 3, 1))
    elif kind in ("transposed", "permuted"):
        assert torch.equal(rows, parameter.t() if kind == "transposed" else parameter.permute(1, 2, 0))
    else:
        assert torch.equal(rows, parameter)


def test_a_layout_that_is_cut_keeps_the_shapes_of_whole_tensors() -> None:
    layout = Layout(("a", "b", "c"), (12, 6, 5), ((3, 4), (2, 3), (5,)))
    assert layout.cut(0, 23) == layout
    assert layout.cut(4, 20) == (("a@4", "b", "c@0"), (8, 6, 2), ((8,), (2, 3), (2,)))
    plain = Layout(("a", "b"), (12, 6))
    assert plain.dimensions() == ((12,), (6,))
    assert plain.cut(2, 18) == (("a@2", "b"), (10, 6), ())


def test_adopting_again_takes_new_storage_back() -> None:
    """Somebody wrote ``p.data = ...``: his values count, in the old place."""
    bucket = bucket_of("matrix", "scalar", "transposed")
    mirror = bucket.flat_buffer(bucket.dtype)
    bucket.move_params_to(mirror)
    kept = bucket.parameters[0].detach().clone()
    bucket.parameters[2].data = torch.full((4, 3), 7.0)
    bucket.move_params_to(mirror)
    assert bucket.parameters[2].data_ptr() == mirror.views[2].data_ptr()
    assert bool((bucket.parameters[2] == 7.0).all())
    assert torch.equal(bucket.parameters[0], kept)


def test_repoint_takes_the_mirrors_values() -> None:
    bucket = bucket_of("matrix", "transposed")
    mirror = bucket.flat_buffer(bucket.dtype)
    mirror.flat.copy_(torch.arange(24.0))
    bucket.point_params_at(mirror)
    assert torch.equal(bucket.parameters[0].detach(), torch.arange(12.0).view(3, 4))
    assert torch.equal(bucket.parameters[1].detach(), torch.arange(12.0, 24.0).view(3, 4).t())
