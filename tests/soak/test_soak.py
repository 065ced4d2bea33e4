"""A short soak in every full run; the long one is ``make soak``."""

from __future__ import annotations

import re
import sys

import pytest

from tests.multirank.support.harness import launch


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_two_thousand_steps(seed: int) -> None:
    argv = [sys.executable, "-m", "tests.soak.soak", "--steps", "2000", "--seed", str(seed)]
    outcome = launch(argv, ranks=4, timeout=600.0)
    assert outcome.returncode == 0, outcome.output[-10000:]
    told = set(re.findall(r"rank (\d): \d+ steps, memory ", outcome.output))
    assert told == set("0123"), outcome.output[-10000:]
