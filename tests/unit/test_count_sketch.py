"""The count-sketch: its formula and its random draw, with compiled loops and with torch's operations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_compress import native
from hvd_compress.compressors import Combine, CountSketch, Layout, counter_rng, sketch_hash
from hvd_compress.compressors.counter_rng import draw
from hvd_compress.native import sketch as loops
from tests.unit.sketching import CPU, DTYPES, coder, estimates, one_way, places, table_of, values, way

__all__ = ["way"]  # the fixture


# -- the formula ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.one_of(st.sampled_from([1, 2]), st.integers(1, 150)),
    st.integers(1, 7),
    st.integers(1, 160),
    st.sampled_from(DTYPES),
    st.integers(0, 2**66),
    st.integers(0, 10**9),
)
def test_sketch_and_estimate_follow_the_formula(
    n: int, rows: int, columns: int, dtype: torch.dtype, seed: int, step: int
) -> None:
    v, c = values(n, dtype=dtype), min(n, columns)
    codec = coder(n, step, dtype, rows=rows, columns=columns, seed=seed)
    column, sign = places(seed, "w", step, n, rows, c)
    expected = np.zeros((rows, c))
    for j in range(rows):
        np.add.at(expected[j], column[j], sign[j] * v.double().numpy())

    payload = table_of(codec, v)
    assert (codec.rows, codec.columns, codec.numel, codec.dtype) == (rows, c, rows * c, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(payload.double().numpy().reshape(rows, c), expected, rtol=0, atol=tolerance)

    looked_up = np.stack([sign[j] * payload.double().numpy().reshape(rows, c)[j, column[j]] for j in range(rows)])
    out = estimates(codec, payload, n)
    np.testing.assert_allclose(out.double().numpy(), np.median(looked_up, axis=0), rtol=1e-6)

    flat = values(n, 5, dtype)
    before = flat.clone()
    codec.accumulate(payload, flat, -0.75)
    torch.testing.assert_close(flat, before - 0.75 * out)


@pytest.mark.parametrize(
    ("numel", "arguments", "columns"),
    [
        (10**6, {}, 2000),
        (10**6, {"density": 1}, 10**6),
        (10, {}, 1),
        (1, {}, 1),
        (2, {"rows": 1}, 1),
        (0, {}, 0),
        (0, {"columns": 7}, 0),
        (5, {"columns": 7}, 5),
        (1999, {"density": 0.5, "rows": 2}, 499),
        (7, {"density": 1}, 7),
    ],
)
def test_sizes(numel: int, arguments: dict[str, Any], columns: int) -> None:
    config = CountSketch(**arguments)
    assert config.width(numel) == columns
    assert coder(min(numel, 9999), **arguments).numel == config.rows * config.width(min(numel, 9999))


def test_properties() -> None:
    assert CountSketch().combine is Combine.SKETCH
    assert not CountSketch().is_sparsifier
    assert not torch.equal(CountSketch().decode(CountSketch().encode(values(500))), values(500)), "lossy"
    assert CountSketch().payload_ratio == 0.01
    assert CountSketch(density=1).payload_ratio == 5.0
    assert CountSketch(columns=99).payload_ratio == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.01}, "density"),
        ({"rows": 0}, r"rows=0 .* >= 1"),
        ({"rows": 2.5}, "rows=2.5"),
        ({"columns": 0}, r"columns=0 .* >= 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CountSketch: .*{message}"):
        CountSketch(**arguments)


@settings(max_examples=25)
@given(st.integers(0, 120), st.integers(1, 6), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_density_one_is_exact(n: int, rows: int, dtype: torch.dtype, step: int) -> None:
    v = values(n, dtype=dtype)
    codec = coder(n, step, dtype, rows=rows, density=1)
    assert torch.equal(estimates(codec, table_of(codec, v), n), v)


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 6), st.integers(0, 1000))
def test_it_is_linear(n: int, columns: int, rows: int, step: int) -> None:
    codec = coder(n, step, columns=columns, rows=rows)
    a, b = values(n, 1), values(n, 2)
    torch.testing.assert_close(
        table_of(codec, a) + 0.5 * table_of(codec, b), table_of(codec, a + 0.5 * b), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("shape", [(7, 30), (), (1,), (0, 3)])
def test_one_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    config, v = CountSketch(density=0.2, rows=3), values(math.prod(shape), dtype=dtype).view(shape)
    payload = config.encode(v, "w", 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codec = coder(v.numel(), 3, wide, density=0.2, rows=3)
    assert torch.equal(payload.values, table_of(codec, v.reshape(-1).to(wide)))
    assert payload.nbytes == 3 * config.width(v.numel()) * wide.itemsize
    decoded = config.decode(payload)
    assert (decoded.dtype, decoded.shape) == (dtype, shape)
    assert torch.equal(decoded.view(-1), estimates(codec, payload.values, v.numel()).to(dtype))
    if len(shape) == 2:
        assert torch.equal(config.decode(config.encode(v.t().contiguous().t(), "w", 3)), decoded), "any strides"


def test_a_nan_is_not_lost() -> None:
    v = values(60)
    v[17] = math.nan
    codec = coder(60, columns=20, rows=5)
    payload = table_of(codec, v)
    assert torch.isnan(estimates(codec, payload, 60)[17])
    assert 17 in codec.heavy_hitters(payload, 30).tolist()


def test_each_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways agree, also with tiles of ordinary size and rotations in several threads."""
    monkeypatch.setattr(sketch_hash, "_CPU_TILE", 2**10)
    n, results = 50_000, []
    for setting in ("as it is", "threads", "torch"):
        monkeypatch.setattr(native, "threads", lambda work, parts, k=setting: min(3, parts) if k == "threads" else 1)
        if setting == "torch":
            monkeypatch.setattr(loops, "_sketch", None)
            monkeypatch.setattr(sketch_hash, "_MAX_SLICES", 2**12)
        for rows in (1, 2, 3, 5, 8):
            codec = coder(n, 4, columns=1300, rows=rows)
            payload = table_of(codec, values(n))
            results.append([payload, estimates(codec, payload, n), codec.heavy_hitters(payload, 2000).clone()])
    for one, threaded, torchs in zip(results[:5], results[5:10], results[10:]):
        assert all(torch.equal(a, b) for a, b in zip(one, threaded))
        assert float((one[0] - torchs[0]).abs().max()) < 2e-6 * float(one[0].abs().max())
        torch.testing.assert_close(one[1], torchs[1], rtol=0, atol=1e-4)


# -- the random draw -----------------------------------------------------------------------------------


def test_the_draw_is_pinned() -> None:
    """The draw is part of the format: ranks may run different releases."""
    codec = coder(1000, 3, columns=100, rows=2)
    payload = table_of(codec, torch.arange(1000.0))
    assert payload[:4].tolist() == [336.0, 436.0, 436.0, 436.0]


def test_hashing_is_the_numpy_draw() -> None:
    keys = counter_rng.outputs(2**64 - 5, 300, CPU)
    expected = np.array([draw(np.array([2**64 - 5], dtype=np.uint64), i)[0] for i in range(300)])
    assert np.array_equal(keys.numpy().view(np.uint64), expected)
    for step in (0, 1, 10**9):
        assert np.array_equal(counter_rng.draw_on_device(keys, step).numpy().view(np.uint64), draw(expected, step))


@pytest.mark.parametrize("other", [{"step": 1}, {"seed": 1}, {"name": "b"}])
def test_step_seed_and_name_change_the_hash(other: dict[str, Any]) -> None:
    def table(step: int = 0, seed: int = 0, name: str = "a") -> Tensor:
        codec = CountSketch(seed=seed, columns=50).codec(Layout((name, "c"), (400, 100)), torch.float32, CPU)
        codec.set_step(step)
        return table_of(codec, values(500))

    assert torch.equal(table(), table())
    assert not torch.allclose(table(), table(**other))


def test_rows_are_independent_of_their_number() -> None:
    v = values(500)
    few, many = (table_of(coder(500, columns=40, rows=r), v) for r in (3, 6))
    assert torch.equal(few, many[: 3 * 40])


def test_a_codec_remembers_nothing_of_earlier_steps() -> None:
    one, other = coder(300, 7, columns=30), coder(300, 2, columns=30)
    table_of(other, values(300, 3))
    for step in (9, 7):
        other.set_step(step)
    assert torch.equal(table_of(one, values(300)), table_of(other, values(300)))
    assert table_of(one, values(300)).numel() == one.numel == 150


@one_way
def test_process_and_hash_seed_do_not_matter(way: str) -> None:
    code = (
        "import json, torch\n"
        "from hvd_compress.compressors import CountSketch\n"
        "payload = CountSketch(columns=20).encode(torch.arange(200.0), 'größe', 5)\n"
        "print(json.dumps([hash('a'), payload.values.tolist()]))\n"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONHASHSEED": seed, "HOROVOD_RANK": "3"},
    )
    assert child.returncode == 0, child.stderr
    hashed, table = json.loads(child.stdout)
    assert hashed != hash("a"), "the hash seed has had no effect: this test proves nothing"
    assert table == CountSketch(columns=20).encode(torch.arange(200.0), "größe", 5).values.tolist()
