"""A rank that fails never leaves the others hanging: the whole job ends soon, and not with success."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.multirank.support.harness import launch

SCRIPT = str(Path(__file__).parent / "dying.py")
CASES = [
    ("raise", "backward", "ef", 3, "gloo"),
    ("raise", "exchange", "alltoall", 2, "gloo"),
    ("exit", "exchange", "tree", 3, "mpi"),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("raise", "step", "def", 2, "gloo"),
            ("exit", "step", "def", 3, "gloo"),
            ("exit", "backward", "dense", 2, "mpi"),
            ("exit", "exchange", "alltoall", 3, "gloo"),
            ("raise", "exchange", "alltoall", 2, "mpi"),
            ("raise", "exchange", "allgather", 2, "gloo"),
            ("exit", "exchange", "allgather", 3, "mpi"),
            ("raise", "exchange", "tree", 2, "mpi"),
            ("exit", "exchange", "merges", 2, "mpi"),
            ("raise", "exchange", "merges", 3, "mpi"),
        )
    ),
]


@pytest.mark.parametrize(("way", "place", "name", "ranks", "launcher"), CASES)
def test_job_ends(way: str, place: str, name: str, ranks: int, launcher: str) -> None:
    outcome = launch([sys.executable, SCRIPT, way, place, name], ranks, launcher, timeout=300)
    assert outcome.returncode not in (None, 0), f"the job ended with {outcome.returncode}\n{outcome.output}"
    assert "trained to the end" not in outcome.output
    assert "this rank gives up" in outcome.output, outcome.output
