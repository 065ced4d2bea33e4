"""PowerSGD: the factors, their error, several ranks together, and independence of all but (seed, name)."""

from __future__ import annotations

import math
import random
from typing import Any, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress.compressors import Combine, JointCodec, Layout, LowRank, counter_rng
from hvd_compress.compressors.low_rank import LowRankCodec

CPU = torch.device("cpu")
SHAPES = ((6, 4, 3), (5,), (), (0, 3), (30, 20), (12, 12), (3, 2), (1, 30, 20), (6, 12))
LAYOUT = Layout(tuple(f"p{i}" for i in range(len(SHAPES))), tuple(math.prod(s) for s in SHAPES), SHAPES)
MATRICES = {0: (6, 12), 4: (30, 20), 5: (12, 12), 7: (30, 20), 8: (6, 12)}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coder(layout: Layout = LAYOUT, dtype: torch.dtype = torch.float32, **arguments: Any) -> LowRankCodec:
    return LowRank(**arguments).codec(layout, dtype, CPU)


def exchange(codecs: Sequence[LowRankCodec], flats: Sequence[Tensor], step: int = 0) -> list[Tensor]:
    """Exchange in all rounds and return the decoded vector of each rank."""
    for codec in codecs:
        codec.set_step(step)
    for index, numel in enumerate(codecs[0].numels):
        payloads = [torch.full((numel,), math.nan, dtype=codecs[0].dtype) for _ in codecs]
        for codec, flat, payload in zip(codecs, flats, payloads):
            codec.encode(index, flat, payload)
        mean = torch.stack(payloads).mean(0)
        for codec in codecs:
            codec.receive(index, mean)
        # The codec must have copied what it received: the buffer belongs to the caller.
        mean.fill_(math.nan)
    decoded = [torch.zeros_like(flat) for flat in flats]
    for codec, out in zip(codecs, decoded):
        codec.accumulate(out, 1.0)
        codec.commit()
    return decoded


def one_matrix(n: int, m: int) -> Layout:
    return Layout(("w",), (n * m,), ((n, m),))


def best(matrix: Tensor, r: int) -> float:
    """Return the squared error of the best approximation of rank r."""
    return float((torch.linalg.svdvals(matrix.double())[r:] ** 2).sum())


# -- one tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "factors"),
    [
        ((100, 50), 4, (100, 50, 4)),
        ((64, 3, 3, 3), 4, (64, 27, 4)),
        ((100,), 4, (0, 0, 0)),
        ((), 1, (0, 0, 0)),
        ((2, 2), 1, (0, 0, 0)),
        ((3, 3), 1, (3, 3, 1)),
        ((8, 8), 4, (0, 0, 0)),
        ((1, 30, 20), 2, (30, 20, 2)),
        ((30, 1, 1), 2, (0, 0, 0)),
        ((0, 3), 1, (0, 0, 0)),
        ((5, 1000), 99, (0, 0, 0)),
        ((5, 1000), 4, (5, 1000, 4)),
    ],
)
def test_shapes_of_factors(shape: tuple[int, ...], rank: int, factors: tuple[int, int, int]) -> None:
    assert LowRank(rank).factors(shape) == factors


@given(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.integers(1, 5),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_one_tensor(shape: tuple[int, ...], rank: int, dtype: torch.dtype, step: int) -> None:
    config, v = LowRank(rank), values(*shape, dtype=dtype)
    payload, (n, m, r) = config.encode(v, "w", step), config.factors(shape)
    kept = config.decode(payload)
    assert (kept.shape, kept.dtype) == (v.shape, dtype)
    if not r:
        assert torch.equal(kept, v)
        assert payload.nbytes == v.numel() * dtype.itemsize
        return
    assert payload.values.numel() == r * (n + m) < v.numel()
    assert payload.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    lost, energy = (v.double() - kept.double()).square().sum(), v.double().square().sum()
    assert lost <= energy * (1 + 1e-2 * (dtype.itemsize == 2) + 1e-5), "contraction"
    assert lost >= best(v.reshape(n, m), r) * 0.99 - 1e-9
    if dtype in (torch.float32, torch.float64):
        p = payload.values[: n * r].view(n, r).double()
        torch.testing.assert_close(p.t() @ p, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_matrix_of_low_rank_is_exact() -> None:
    v = values(40, 3, dtype=torch.float64) @ values(3, 50, seed=1, dtype=torch.float64)
    for rank in (3, 4, 9):
        torch.testing.assert_close(LowRank(rank).decode(LowRank(rank).encode(v, "w", 2)), v)


def test_strides_do_not_matter() -> None:
    v, config = values(20, 30), LowRank(2)
    torch.testing.assert_close(config.encode(v.t().contiguous().t()).values, config.encode(v).values)


def test_properties() -> None:
    assert LowRank().combine is Combine.JOINT
    assert not LowRank().is_sparsifier
    assert isinstance(coder(), JointCodec)
    with pytest.raises(ValueError, match="cannot be cut into shards"):
        LowRank().sharded(LAYOUT, [0, 8, LAYOUT.total], torch.float32, CPU)


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"seed": -1}])
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=rf"LowRank: {name}={value} is not allowed; it must be an integer >="):
        LowRank(**arguments)


# -- a bucket ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 99])
def test_sizes(rank: int, dtype: torch.dtype) -> None:
    codec = coder(dtype=dtype, rank=rank)
    factors = [LowRank(rank).factors(shape) for shape in SHAPES]
    whole = sum(numel for numel, (_, _, r) in zip(LAYOUT.numels, factors) if not r)
    assert codec.numels == (sum(n * r for n, _, r in factors) + whole, sum(m * r for _, m, r in factors))
    assert codec.dtype == dtype
    warm = codec.warm_start()["warm"]
    assert [tuple(t.shape) for t in warm] == [(m, r) if r else (0,) for _, m, r in factors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_do_powersgd_of_the_mean(ranks: int, dtype: torch.dtype) -> None:
    """The result is that of algorithm 1 of the paper in float64, on the ranks' mean matrix, with a warm start."""
    codecs = [coder(dtype=dtype, rank=2) for _ in range(ranks)]
    q = {i: codecs[0].warm_start()["warm"][i].double().clone() for i in MATRICES}
    for step in range(4):
        flats = [values(LAYOUT.total, seed=10 * step + k, dtype=dtype) for k in range(ranks)]
        decoded = exchange(codecs, flats, step)
        assert all(torch.equal(decoded[0], other) for other in decoded), "the same on every rank"
        mean = torch.split(torch.stack(flats).double().mean(0), list(LAYOUT.numels))
        for i, part in enumerate(torch.split(decoded[0], list(LAYOUT.numels))):
            expected = mean[i]
            if i in MATRICES:
                matrix = mean[i].view(MATRICES[i])
                p = torch.linalg.qr(matrix @ q[i]).Q
                q[i] = matrix.t() @ p
                expected = (p @ q[i].t()).view(-1)
            torch.testing.assert_close(part.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_each_rank_gives_away_its_own_part() -> None:
    """What ranks subtract is what is decoded, on the mean; of what they do not share too, so a residual is bounded."""
    codecs = [coder(dtype=torch.float64, rank=2) for _ in range(3)]
    apart = [values(LAYOUT.total, seed=k, dtype=torch.float64) for k in range(3)]
    mean = torch.stack(apart).mean(0)
    own = [part - mean for part in apart]  # nothing in common: the aggregate is zero up to rounding
    residuals = [torch.zeros_like(part) for part in own]
    sizes = []
    for step in range(400):
        compensated = [e + g for e, g in zip(residuals, own)]
        decoded = exchange(codecs, compensated, step)[0]
        residuals = [p.clone() for p in compensated]
        for codec, residual in zip(codecs, residuals):
            codec.subtract_sent(residual)
        given = torch.stack([p - e for p, e in zip(compensated, residuals)]).mean(0)
        torch.testing.assert_close(given, decoded, rtol=0, atol=1e-9)
        sizes.append(float(torch.stack(residuals).norm()))
    assert sizes[-1] < 3 * sizes[40], f"{sizes[40]} after 40 steps, {sizes[-1]} after 400"


def test_a_step_that_is_given_up_leaves_the_warm_start() -> None:
    codec = coder(rank=2)
    exchange([codec], [values(LAYOUT.total)])
    before = [t.clone() for t in codec.warm_start()["warm"]]
    for index, numel in enumerate(codec.numels):
        payload = torch.empty(numel)
        codec.encode(index, values(LAYOUT.total, seed=5), payload)
        codec.receive(index, payload)
    assert all(map(torch.equal, before, codec.warm_start()["warm"]))


def test_accumulate_adds() -> None:
    codec, flat, other = coder(rank=2), values(LAYOUT.total), values(LAYOUT.total, seed=1)
    decoded, before = exchange([codec], [flat])[0], other.clone()
    codec.accumulate(other, -0.5)
    torch.testing.assert_close(other, before - 0.5 * decoded)
    unchanged = flat.clone()
    exchange([codec], [flat])
    assert torch.equal(flat, unchanged), "encode must not touch its input"


@settings(max_examples=25)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 4), st.integers(0, 99))
def test_contraction(n: int, m: int, rank: int, seed: int) -> None:
    flat = values(n * m, seed=seed)
    codec = coder(one_matrix(n, m), rank=rank, seed=seed)
    energy = float(flat.square().sum())
    lost = [float((flat - exchange([codec], [flat], step)[0]).square().sum()) for step in range(3)]
    assert all(x <= energy * (1 + 1e-5) for x in lost)
    assert lost[2] <= lost[0] + 1e-4 * energy, "a step more of the power iteration is no worse"


def test_the_warm_start_finds_the_best_approximation() -> None:
    u, v = (torch.linalg.qr(values(size, 15, seed=size, dtype=torch.float64)).Q for size in (40, 30))
    matrix = (u * 0.6 ** torch.arange(15, dtype=torch.float64)) @ v.t()
    codec, energy = coder(one_matrix(40, 30), torch.float64, rank=3), float(matrix.square().sum())
    errors = [
        float((matrix.view(-1) - exchange([codec], [matrix.reshape(-1)], step)[0]).square().sum()) for step in range(25)
    ]
    assert errors[0] > best(matrix, 3) + 1e-5 * energy
    assert errors[-1] == pytest.approx(best(matrix, 3), rel=1e-6)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(errors, errors[1:]))
    codec.reset()
    again = exchange([codec], [matrix.reshape(-1)], 0)[0]
    assert float((matrix.view(-1) - again).square().sum()) == pytest.approx(errors[0], rel=1e-9)


def test_a_full_rank_is_exact() -> None:
    flat = values(5 * 200)
    codec = coder(one_matrix(5, 200), rank=4)
    assert not torch.allclose(exchange([codec], [flat])[0], flat, atol=1e-3)
    assert torch.equal(exchange([coder(one_matrix(5, 200), rank=5)], [flat])[0], flat), "whole: no larger than factors"


def test_a_zero_matrix_decodes_to_zero_and_is_forgotten() -> None:
    """A layer without gradients at one step must not be lost at all later steps."""
    codec, flat = coder(rank=2), values(LAYOUT.total)
    assert torch.equal(exchange([codec], [torch.zeros_like(flat)])[0], torch.zeros_like(flat))
    assert torch.equal(exchange([codec], [flat], 1)[0], exchange([coder(rank=2)], [flat])[0])


def test_after_a_step_that_is_not_finite() -> None:
    codec, flat = coder(rank=2), values(LAYOUT.total)
    exchange([codec], [torch.full_like(flat, math.nan)])
    assert torch.equal(exchange([codec], [flat], 1)[0], exchange([coder(rank=2)], [flat])[0])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    flat = values(600)
    one, other = coder(one_matrix(30, 20), rank=3), coder(one_matrix(30, 20), rank=3)
    for step in range(3):
        plain, scaled = exchange([one], [flat], step)[0], exchange([other], [flat * scale], step)[0]
        torch.testing.assert_close(scaled.double() / scale, plain.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", [Layout((), ()), Layout(("a",), (0,)), Layout(("a", "b"), (7, 5))])
def test_without_matrices(layout: Layout) -> None:
    flat = values(layout.total)
    codec = coder(layout)
    assert codec.numels == (layout.total, 0)
    assert torch.equal(exchange([codec], [flat])[0], flat)


# -- state and random draws ----------------------------------------------------------------------------


def test_the_warm_start_is_all_of_the_state() -> None:
    """A checkpoint copies the warm start and writes it back."""
    one, other = coder(rank=2), coder(rank=2)
    for step in range(3):
        exchange([one], [values(LAYOUT.total, seed=step)], step)
    saved = [t.clone() for t in one.warm_start()["warm"]]
    for target, source in zip(other.warm_start()["warm"], saved):
        target.copy_(source)
    flat = values(LAYOUT.total, seed=9)
    assert torch.equal(exchange([one], [flat], 3)[0], exchange([other], [flat], 3)[0])


def test_names_and_seeds_draw_and_positions_do_not() -> None:
    layout = Layout(("a", "b"), (600, 600), ((30, 20), (30, 20)))
    turned = Layout(("b", "a"), (600, 600), ((30, 20), (30, 20)))
    a, b = coder(layout).warm_start()["warm"]
    assert torch.equal(coder(turned).warm_start()["warm"][1], a)
    assert not torch.allclose(a, b)
    assert not torch.allclose(coder(layout, seed=1).warm_start()["warm"][0], a)
    config = LowRank()
    assert not torch.equal(config.encode(values(30, 20), "a", 0).values, config.encode(values(30, 20), "a", 1).values)


def test_the_draw_is_pinned_and_nearly_normal() -> None:
    drawn = counter_rng.nearly_normal(12345, (500, 200), CPU)
    assert drawn.dtype == torch.float32
    assert drawn[0, :3].tolist() == [-1.0834832191467285, 1.741063117980957, -1.019234299659729]
    assert abs(float(drawn.mean())) < 5 / math.sqrt(1e5)
    assert abs(float(drawn.var()) - 1) < 0.02
    assert abs(float((drawn[:, 0] * drawn[:, 1]).mean())) < 5 / math.sqrt(500)
    assert 2.5 < float(drawn.pow(4).mean()) < 3.0, "3 if normal, 2.7 for four uniform numbers"


def test_global_generators_are_neither_used_nor_moved() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = states()
        results.append([exchange([coder()], [values(LAYOUT.total)])[0], LowRank().encode(values(30, 20), "w").values])
        assert states() == before
    assert all(torch.equal(a, b) for a, b in zip(*results))
