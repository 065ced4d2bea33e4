"""Warm-up: the compressor of each stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress import BlockSign, Cast, Compressor, Identity, RandomBlock, RandomK, TopK, Warmup
from hvd_compress.compressors import Layout

KINDS: tuple[Any, ...] = (TopK(0.1), RandomK(0.1, seed=3), RandomBlock(0.1, seed=3))


@given(
    kind=st.sampled_from(KINDS),
    densities=st.lists(st.floats(0.01, 1.0), max_size=4),
    steps=st.integers(1, 9),
    step=st.integers(0, 50),
)
def test_the_stage_decides_the_density_and_nothing_else(
    kind: Any, densities: list[float], steps: int, step: int
) -> None:
    warm = Warmup(kind, densities, steps)
    now: Any = warm.at(step)
    density = [*densities, kind.density][min(step // steps, len(densities))]
    if density == 1.0:
        assert now == Identity()  # no indices, and payloads are summed
    else:
        assert now == dataclasses.replace(kind, density=density)
    tensor = torch.linspace(-3.0, 5.0, 40).reshape(5, 8)
    payload = warm.encode(tensor, "w", step)
    assert torch.equal(payload.values, now.encode(tensor, "w", step).values)
    assert torch.equal(warm.decode(payload), now.decode(now.encode(tensor, "w", step)))


@given(start=st.floats(0.02, 1.0), end=st.floats(0.001, 1.0), stages=st.integers(1, 6))
def test_geometric_stages_fall_by_one_factor(start: float, end: float, stages: int) -> None:
    warm = Warmup.geometric(TopK(end), start, stages, 7)
    falling = [*warm.densities, end]
    assert len(warm.densities) == stages
    assert warm.steps == 7
    assert falling[0] == pytest.approx(start)
    assert [b / a for a, b in zip(falling, falling[1:])] == pytest.approx([(end / start) ** (1 / stages)] * stages)


def test_geometric_is_deep_gradient_compressions_schedule() -> None:
    warm = Warmup.geometric(TopK(1 / 1000), 0.25, 4, 500)
    assert [warm.at(500 * i).density for i in range(5)] == pytest.approx(  # type: ignore[attr-defined]
        [0.25, 0.0625, 0.015625, 0.004, 0.001], rel=0.02
    )


def test_it_combines_as_its_compressor_does() -> None:
    for kind in KINDS:
        warm = Warmup(kind)
        assert (warm.combine, warm.is_sparsifier, warm.payload_ratio) == (
            kind.combine,
            kind.is_sparsifier,
            kind.payload_ratio,
        )


def test_stages_are_the_compressors_of_their_steps() -> None:
    warm = Warmup(TopK(0.1), (1.0, 0.5), 3)
    assert warm.stages == (Identity(), TopK(0.5), TopK(0.1)) == (warm.at(2), warm.at(5), warm.at(6))


def test_a_codec_for_all_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="stage by stage"):
        Warmup(TopK(0.1)).codec(Layout(("a",), (8,)), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"compressor": BlockSign()}, "compressor=BlockSign"),
        ({"compressor": Identity()}, "compressor=Identity"),
        ({"compressor": Cast()}, "compressor=Cast"),
        ({"compressor": 0.1}, "compressor=0.1"),
        ({"densities": 0.5}, "densities=0.5"),
        ({"densities": "0.5"}, "densities='0.5'"),
        ({"densities": (0.5, 2.0)}, "densities[1] (the fraction of elements sent)=2.0"),
        ({"densities": (0.0,)}, "densities[0]"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
    ],
)
def test_wrong_values_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="Warmup") as refusal:
        Warmup(**{"compressor": TopK(0.1), **arguments})
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 0.0}, "start"),
        ({"start": 1.5}, "start"),
        ({"stages": 0}, "stages=0"),
        ({"steps": 0}, "steps=0"),
        ({"compressor": BlockSign()}, "compressor=BlockSign"),
    ],
)
def test_wrong_values_of_geometric_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    compressor: Compressor = TopK(0.1)
    with pytest.raises(ValueError, match="Warmup") as refusal:
        Warmup.geometric(**{"compressor": compressor, "start": 0.25, "stages": 4, "steps": 10, **arguments})
    assert said in str(refusal.value)
