"""The one pass over x, e and z: against the plain formula, over tile borders, and exact where it says so."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress import native
from hvd_compress.algorithms import residual_update
from hvd_compress.algorithms.residual_update import TILE, ResidualUpdate, detached_point

SMALL = 512  # most tests use smaller tiles, to be quick
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
pairs = pytest.mark.parametrize(("state", "dtype"), PAIRS, ids=str)


def dyadic(n: int, step: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Multiples of ``step`` below 8 steps: with factors of few bits, no operation on them rounds."""
    steps = torch.randint(-7, 8, (n,), generator=torch.Generator().manual_seed(seed))
    return (steps * step).to(dtype)


def normal(n: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def bits(v: Tensor) -> Tensor:
    return v.clone().view(BITS[v.element_size()])


def wide(v: Tensor) -> Tensor:
    """A copy in float64."""
    return v.to(torch.float64, copy=True)


KERNELS = "hvd_compress.native._kernels"
LOADED = native._kernels  # before any test patches it
BUILT = importlib.util.find_spec(KERNELS) is not None


@pytest.fixture(autouse=True, params=["torch", "native"] if BUILT else ["torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything with torch's operations, and with the compiled loops where they are built."""
    monkeypatch.setattr(native, "_kernels", importlib.import_module(KERNELS) if request.param == "native" else None)
    return str(request.param)


@pytest.fixture(params=[0, 1, *(SMALL + d for d in (-1, 0, 1)), "real"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lengths around the borders of small tiles, and one of three tiles of the real size."""
    if request.param == "real":
        return 2 * TILE + 17
    monkeypatch.setattr(residual_update, "TILE", SMALL)
    return int(request.param)


# -- the formula ---------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize(("placed", "coefficient", "decay"), [(0.0, 0.0, 1.0), (0.5, 0.25, 1.0), (1.0, 0.5, 0.5)])
def test_exactly_the_formula_where_nothing_rounds(
    size: int, state: torch.dtype, dtype: torch.dtype, placed: float, coefficient: float, decay: float
) -> None:
    x, e = dyadic(size, 1.0, state, 0), dyadic(size, 0.5, state, 1)
    subtracted = dyadic(size, 0.25, state, 2)
    z = (x - placed * e - subtracted).to(dtype)
    x64, e64, z64 = wide(x), wide(e), wide(z)
    ResidualUpdate(x, e, z).apply(placed, coefficient, decay)

    u = (x64 - placed * e64) - z64
    assert torch.equal(u, wide(subtracted)), "the example must not round"
    expected = decay * e64 + u
    assert torch.equal(wide(x), x64)
    assert torch.equal(wide(e), expected)
    assert torch.equal(z, (x64 - coefficient * expected).to(dtype))


@pairs
def test_the_formula_to_rounding(size: int, state: torch.dtype, dtype: torch.dtype) -> None:
    placed, coefficient, decay = 0.3, 0.137, 0.9
    x, e = normal(size, state, 0), normal(size, state, 1, 0.1)
    z = torch.empty(size, dtype=dtype)
    detached_point(x, e, placed, z)
    z.sub_(normal(size, dtype, 2, 0.01))
    x64, e64, z64 = wide(x), wide(e), wide(z)
    ResidualUpdate(x, e, z).apply(placed, coefficient, decay)

    # The point at which z was placed was rounded to z's dtype, and so it must be when it is recomputed.
    expected_z = wide((x64 - placed * e64).to(state).to(dtype))
    expected = decay * e64 + (expected_z - z64)
    error = (wide(e) - expected).abs()
    # float32 and float64 may round to different sides of a tie between two values of a narrower z.
    exact = error <= 80 * torch.finfo(state).eps
    assert int((~exact).sum()) <= size * 1e-3
    assert bool((error <= 8 * torch.finfo(dtype).eps).all())
    torch.testing.assert_close(
        wide(z), x64 - coefficient * wide(e), rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(state).eps
    )


@pairs
@pytest.mark.parametrize("c", [0.3, 0.137, 1.0, 1e-8])
def test_every_way_of_computing_it_rounds_alike(size: int, state: torch.dtype, dtype: torch.dtype, c: float) -> None:
    """Compiled or not, with a number or with a tensor, as accelerators measure it: numpy's bits."""
    x, e, update = normal(size, state, 0), normal(size, state, 1, 0.1), normal(size, dtype, 2, 0.01)
    point = x.numpy() - x.numpy().dtype.type(c) * e.numpy()
    found = []
    for coefficient in (c, torch.tensor(c, dtype=state)):
        z, residual = torch.empty(size, dtype=dtype), e.clone()
        detached_point(x, e, coefficient, z)
        assert torch.equal(bits(z), bits(torch.from_numpy(point).to(dtype)))
        z.sub_(update)
        ResidualUpdate(x, residual, z).apply(coefficient, coefficient, 0.9)
        found.append((bits(residual), bits(z)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pairs
def test_many_steps_conserve_the_sum(size: int, state: torch.dtype, dtype: torch.dtype) -> None:
    """While nothing is exchanged, e is the sum of what was subtracted: nothing is lost or counted twice."""
    x, e, z = normal(size, state, 0), torch.zeros(size, dtype=state), torch.empty(size, dtype=dtype)
    detached_point(x, e, 0.3, z)
    update, total = ResidualUpdate(x, e, z), torch.zeros(size, dtype=torch.float64)
    for step in range(10):
        before = wide(z)
        z.sub_(normal(size, dtype, step, 0.05))
        total += before - wide(z)  # what was really subtracted, after rounding to z's dtype
        update.apply(0.3, 0.3)
    assert bool(((wide(e) - total).abs() < 10 * 8 * torch.finfo(state).eps).all())


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])
@pairs
def test_detached_point(state: torch.dtype, dtype: torch.dtype, coefficient: float) -> None:
    x, e = normal(1000, state, 0), normal(1000, state, 1)
    out = torch.full((1000,), float("nan"), dtype=dtype)
    x_before, e_before = x.clone(), e.clone()
    detached_point(x, e, coefficient, out)
    torch.testing.assert_close(
        wide(out), wide(x) - coefficient * wide(e), rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(state).eps
    )
    if coefficient == 0.0:
        assert torch.equal(out, x.to(dtype))
    assert torch.equal(x, x_before)
    assert torch.equal(e, e_before)


def test_compiled_loops_are_in_use_where_they_are_built() -> None:
    wanted = BUILT and os.environ.get("HVD_COMPRESS_NATIVE", "1") != "0"
    assert (LOADED is not None) == wanted


def test_coefficient_zero_ignores_even_what_is_not_finite() -> None:
    out = torch.empty(3)
    detached_point(torch.ones(3), torch.tensor([float("nan"), float("inf"), 0.0]), 0.0, out)
    assert out.tolist() == [1.0, 1.0, 1.0]


# -- what is exact -------------------------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("coefficient", [0.1, 0.3, 0.999, 1.0])
def test_a_step_that_subtracts_nothing_leaves_every_bit(
    state: torch.dtype, dtype: torch.dtype, coefficient: float
) -> None:
    for n in (5, TILE + 17):
        x, e, z = normal(n, state, 0), normal(n, state, 1, 0.1), torch.empty(n, dtype=dtype)
        update = ResidualUpdate(x, e, z)
        detached_point(x, e, coefficient, z)  # in one piece: as the parameters are placed after a restart
        before = bits(x), bits(e), bits(z)
        for _ in range(15):
            update.apply(coefficient, coefficient)
        assert [torch.equal(a, b) for a, b in zip(before, (bits(x), bits(e), bits(z)))] == [True] * 3


def test_a_changing_coefficient_moves_z_but_not_e() -> None:
    """With coefficient="auto" the parameters are placed elsewhere after each step."""
    n = TILE + 9
    x, e, z = normal(n, torch.float32, 0), normal(n, torch.float32, 1), torch.empty(n)
    update, before, placed = ResidualUpdate(x, e, z), e.clone(), 0.3
    detached_point(x, e, placed, z)
    for coefficient in (0.31, 0.7, 0.0, 1.0, 0.123456, 0.3):
        update.apply(placed, coefficient)
        placed = coefficient
    assert torch.equal(bits(e), bits(before))


@given(st.integers(1, 200), st.integers(0, 40), st.floats(0.0, 1.0), st.sampled_from(PAIRS))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rounding_does_not_depend_on_the_position(
    n: int, offset: int, coefficient: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Vector lanes, tails and gathered copies must agree: z is placed in one and recomputed in another."""
    state, dtype = dtypes
    x, e = normal(n + offset, state, 0), normal(n + offset, state, 1)
    whole = torch.empty(n + offset, dtype=dtype)
    detached_point(x, e, coefficient, whole)
    part = torch.empty(n, dtype=dtype)
    detached_point(x[offset:], e[offset:], coefficient, part)
    order = torch.randperm(n + offset, generator=torch.Generator().manual_seed(2))
    gathered = torch.empty(n + offset, dtype=dtype)
    detached_point(x[order], e[order], coefficient, gathered)
    single = [torch.empty(1, dtype=dtype) for _ in range(offset, n + offset)]
    for i, out in enumerate(single):
        detached_point(x[offset + i : offset + i + 1], e[offset + i : offset + i + 1], coefficient, out)
    assert torch.equal(bits(part), bits(whole[offset:]))
    assert torch.equal(bits(torch.cat(single)), bits(part))
    assert torch.equal(bits(gathered), bits(whole[order]))


POSITIONS = """
import torch
from hvd_compress import native
from hvd_compress.algorithms.residual_update import ResidualUpdate, detached_point

native.GRAIN = 10_000
x, e = (torch.randn(200_003, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
kept, z = e.clone(), torch.empty(200_003)
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    detached_point(x, e, 0.3, z)
    ResidualUpdate(x, e, z).apply(0.3, 0.3)
    short = torch.empty_like(z)
    for a, b, c in zip(x.split(601), e.split(601), short.split(601)):
        detached_point(a, b, 0.3, c)
    assert torch.equal(short, z), "rounding depends on the position"
    assert torch.equal(e, kept), f"e has moved with {threads} threads"
print(torch.backends.cpu.get_cpu_capability())
"""


def test_rounding_does_not_depend_on_threads(loops: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "GRAIN", native.GRAIN)
    threads = torch.get_num_threads()
    try:
        exec(compile(POSITIONS, "positions", "exec"), {})
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("loops", ["torch"], indirect=True)
def test_nor_on_the_instruction_set() -> None:
    """In a process of its own, with neither vector instructions nor compiled loops."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "HVD_COMPRESS_NATIVE": "0"}
    child = subprocess.run([sys.executable, "-c", POSITIONS], env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() in ("DEFAULT", "NO AVX")  # the latter before torch 2.2


# -- tiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 31, 32, 33, 61])
def test_any_tile_gives_the_same_bits(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tile in (1, 3, 30, 31, 32, TILE):
        monkeypatch.setattr(residual_update, "TILE", tile)
        x, e, z = (normal(n, torch.float32, seed) for seed in range(3))
        ResidualUpdate(x, e, z).apply(0.3, 0.7, 0.5)
        results.append((x, e, z))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
