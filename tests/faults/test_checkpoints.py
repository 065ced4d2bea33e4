"""Checkpoints outlive their processes: resumed in new ones, on other numbers of ranks, and after a kill."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.multirank.support.harness import launch

SCRIPT = str(Path(__file__).parent / "checkpointing.py")


def run(what: str, directory: Path, ranks: int) -> str:
    """Run the job and return its output; fail unless all ranks got to the end."""
    outcome = launch([sys.executable, SCRIPT, what, str(directory)], ranks, timeout=300)
    assert outcome.returncode == 0, outcome.output
    assert "to the end" in outcome.output
    return outcome.output


@pytest.mark.parametrize(
    ("ranks", "others"),
    [
        (2, (3,)),
        pytest.param(3, (1, 2, 5), marks=pytest.mark.full),
        pytest.param(4, (1, 2, 5), marks=pytest.mark.full),
    ],
)
def test_new_processes_go_on_to_the_bit_and_on_other_numbers_of_ranks(
    ranks: int, others: tuple[int, ...], tmp_path: Path
) -> None:
    run("train", tmp_path, ranks)
    run("resume", tmp_path, ranks)
    for other in others:
        run("share", tmp_path, other)


def test_killed_while_writing_the_last_whole_checkpoint_loads(tmp_path: Path) -> None:
    outcome = launch([sys.executable, SCRIPT, "die", str(tmp_path)], 2, timeout=300)
    assert outcome.returncode not in (None, 0), outcome.output
    assert not (tmp_path / "killed" / "step-00000011" / "checkpoint.json").exists()
    assert (tmp_path / "killed" / "step-00000011").exists(), "the job was killed before it wrote"
    assert "unfinished checkpoints, which are ignored: 11" in run("revive", tmp_path, 2)
