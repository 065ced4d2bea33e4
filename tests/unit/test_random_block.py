"""Position of the random block: its formula, its statistics, and its independence of all but (seed, name, step)."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_compress.compressors import Layout, RandomBlock

STEPS = 12000
densities = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)


def starts(n: int, name: str = "weight", seed: int = 0, first: int = 0, steps: int = STEPS) -> np.ndarray:
    """Return the starts of the block at consecutive steps."""
    block = RandomBlock(density=0.25, seed=seed)
    return np.array([block.selection(name, n, step)[0] for step in range(first, first + steps)])


def surprise(counts: np.ndarray, expected: np.ndarray | float, constraints: int = 1) -> float:
    """Return how many standard deviations chi-square is above its mean; far below is as suspicious as far above."""
    chi_square = float((((counts - expected) ** 2) / expected).sum())
    freedom = counts.size - constraints
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def dependence(a: np.ndarray, b: np.ndarray, bins: int) -> float:
    """Return the ``surprise`` of two sequences in [0, bins) that are expected to be uniform and independent."""
    table = np.bincount(a * bins + b, minlength=bins * bins)
    return surprise(table, len(a) / bins**2)


# -- the formula ---------------------------------------------------------------------------------------


@given(st.integers(1, 10**12), densities, st.integers(0, 2**70), st.text(max_size=30), st.integers(0, 2**60))
def test_selection_follows_the_formula(n: int, density: float, seed: int, name: str, step: int) -> None:
    start, length = RandomBlock(density=density, seed=seed).selection(name, n, step)
    assert length == max(1, math.floor(n * density))
    assert type(start) is int
    assert 0 <= start < n
    assert length <= n


@pytest.mark.parametrize(
    ("n", "density", "length"),
    [
        (1, 1e-9, 1),
        (63, 1 / 64, 1),
        (64, 1 / 64, 1),
        (128, 1 / 64, 2),
        (191, 1 / 64, 2),
        (10, 1.0, 10),
        (3, 0.999, 2),
        (10**8, 1 / 64, 1562500),
    ],
)
def test_block_lengths(n: int, density: float, length: int) -> None:
    assert RandomBlock(density=density).selection("w", n, 0)[1] == length


def test_tensors_of_no_and_of_one_element() -> None:
    for step in range(50):
        assert RandomBlock().selection("w", 0, step) == (0, 0)
        assert RandomBlock().selection("w", 1, step) == (0, 1)


def test_places_are_pinned() -> None:
    """The draw is part of the format: ranks may run different releases, and checkpoints outlive them."""
    block = RandomBlock(density=1 / 64, seed=0)
    assert [block.selection("layer.weight", 1000, step)[0] for step in range(4)] == [723, 87, 113, 499]
    assert RandomBlock(density=0.5, seed=7).selection("größe.重み", 10**8, 123456) == (90014419, 50000000)


# -- statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 16, 97, 300])
def test_start_is_uniform(n: int) -> None:
    counts = np.bincount(starts(n), minlength=n)
    assert abs(surprise(counts, STEPS / n)) < 4.5


@pytest.mark.parametrize("n", [10**8, 2**40 + 1])
def test_start_is_uniform_in_large_tensors(n: int) -> None:
    counts = np.bincount(starts(n) * 100 // n, minlength=100)
    assert abs(surprise(counts, STEPS / 100)) < 4.5
    parity = np.bincount(starts(n) % 16, minlength=16)
    assert abs(surprise(parity, STEPS / 16)) < 4.5


@pytest.mark.parametrize(("n", "density"), [(20, 0.3), (7, 0.5), (50, 0.02), (5, 0.99)])
def test_every_coordinate_is_sent_with_probability_b_over_n(n: int, density: float) -> None:
    sent = np.zeros(n)
    block = RandomBlock(density=density)
    for step in range(STEPS):
        start, length = block.selection("weight", n, step)
        sent[(start + np.arange(length)) % n] += 1
    probability = max(1, math.floor(n * density)) / n
    deviation = math.sqrt(STEPS * probability * (1 - probability))
    assert np.all(np.abs(sent - STEPS * probability) < 5 * deviation)


def test_blocks_wrap_round_the_end() -> None:
    wrapped = 0
    v = torch.arange(1.0, 11.0)
    block = RandomBlock(density=0.4)
    for step in range(200):
        start, length = block.selection("w", 10, step)
        wrapped += start + length > 10
        expected = [v[(start + i) % 10].item() for i in range(length)]
        assert block.encode(v, "w", step).values.tolist() == expected
    assert 20 < wrapped < 100  # 3 of 10 starts wrap


def test_consecutive_steps_are_independent() -> None:
    s = starts(10, steps=STEPS + 3)
    for lag in (1, 2, 3):
        assert abs(dependence(s[:-lag], s[lag:], 10)) < 4.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", 0), ("b", 0)),
        (("layer.1.weight", 0), ("layer.2.weight", 0)),
        (("weight", 0), ("weight", 1)),
        (("weight", 1), ("weight", 2**64 + 1)),  # seeds are not cut to 64 bits
        (("1", 0), ("", 1)),
        (("", 0), (" ", 0)),
    ],
)
def test_names_and_seeds_draw_independently(one: tuple[str, int], other: tuple[str, int]) -> None:
    a, b = starts(10, *one), starts(10, *other)
    # One sequence must not be the other one shifted by a lag either.
    for lag in range(4):
        assert abs(dependence(a[: STEPS - lag], b[lag:], 10)) < 4.5
        assert abs(dependence(b[: STEPS - lag], a[lag:], 10)) < 4.5


def test_two_tensors_of_one_size_do_not_move_together() -> None:
    """If tensors shared an offset, whole layers would be sent completely or not at all."""
    names = [f"block.{i}.weight" for i in range(200)]
    block = RandomBlock()
    rows = np.array([[block.selection(name, 10, step)[0] for name in names] for step in range(20)])
    assert abs(surprise(np.bincount(rows.ravel(), minlength=10), rows.size / 10)) < 4.5
    for row in rows:
        assert abs(surprise(np.bincount(row, minlength=10), len(names) / 10)) < 4.5


# -- nothing else matters ------------------------------------------------------------------------------

CALLS = [
    (seed, name, n, step)
    for seed in (0, 5)
    for name in ("a", "b.weight", "ä")
    for n in (1, 64, 10**6)
    for step in (0, 1, 999_999)
]


def draws(calls: Sequence[tuple[int, str, int, int]]) -> dict[str, list[int]]:
    """Return the selections of all calls, made in the given order."""
    return {repr(call): list(RandomBlock(density=0.1, seed=call[0]).selection(*call[1:])) for call in calls}


def test_call_order_does_not_matter() -> None:
    shuffled = random.Random(1).sample(CALLS, len(CALLS))
    assert draws(CALLS) == draws(shuffled) == draws(CALLS[::-1] + CALLS)


def test_threads_do_not_matter() -> None:
    expected, results = draws(CALLS), []
    threads = [threading.Thread(target=lambda: results.append(draws(CALLS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_rank_process_and_hash_seed_do_not_matter() -> None:
    """Another process draws the same, as another rank would."""
    code = (
        "import json, sys\n"
        "from hvd_compress.compressors import RandomBlock\n"
        "calls = [tuple(c) for c in json.load(sys.stdin)]\n"
        "found = {repr(c): RandomBlock(density=0.1, seed=c[0]).selection(*c[1:]) for c in calls}\n"
        "print(json.dumps({'hash': hash('a'), 'found': found}))\n"
    )
    # One child process is enough: this process has another hash seed and is not a rank.
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    env = {**os.environ, "PYTHONHASHSEED": seed, "HOROVOD_RANK": "3", "HOROVOD_SIZE": "4"}
    child = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(CALLS), capture_output=True, text=True, env=env, timeout=300
    )
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    assert answer["hash"] != hash("a"), "the hash seed has had no effect: this test proves nothing"
    assert answer["found"] == draws(CALLS)


def test_global_generators_are_neither_used_nor_moved() -> None:
    block = RandomBlock(density=0.2, seed=3)
    v = torch.arange(50.0)

    def work() -> list[object]:
        codec = block.codec(Layout(("a", "b"), (20, 30)), torch.float32, v.device)
        codec.set_step(4)
        sent = torch.empty(codec.numel)
        codec.encode(v, sent)
        payload = block.encode(v, "a", 9)
        return [block.selection("a", 50, 9), sent.tolist(), block.decode(payload).tolist()]

    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = states()
        results.append(work())
        assert states() == before
    assert results[0] == results[1]


def test_a_codec_remembers_nothing_of_earlier_steps() -> None:
    layout = Layout(("a", "b", "c"), (20, 1, 33))
    v = torch.arange(54.0)
    payloads = []
    for history in ((), (900, 2, 2), (5, 6)):
        codec = RandomBlock(density=0.3).codec(layout, torch.float32, v.device)
        for step in (*history, 5):
            codec.set_step(step)
        payloads.append(torch.empty(codec.numel))
        codec.encode(v, payloads[-1])
    assert torch.equal(payloads[0], payloads[1])
    assert torch.equal(payloads[0], payloads[2])
