"""Horovod's own tests of its optimizer, run against ours."""

from __future__ import annotations

import functools
import os
import sys
from typing import Optional

import pytest

from tests.conformance.substitute import ALGORITHMS, BY_MPI
from tests.multirank.support.harness import Outcome, launch

pytestmark = pytest.mark.full

CHECKOUT = os.environ.get("HOROVOD_TESTS")
HOW = (
    "Horovod's tests are not in its releases: git clone --depth 1 --branch v0.28.1 "
    "https://github.com/horovod/horovod, and set HOROVOD_TESTS to the path of horovod/test"
)
UNKNOWN = "never finished (or never began)"
# All that build an optimizer.
TESTS = (
    "test_broadcast_state",
    "test_broadcast_state_no_grad",
    "test_broadcast_state_options",
    "test_delta_optimizer",
    "test_duplicate_names",
    "test_dynamic_requires_grad",
    "test_force_allreduce",
    "test_gradient_clipping",
    "test_missing_named_parameters",
    "test_model_parallelism",
    "test_no_named_parameters",
    "test_optimizer_no_named_parameters",
    "test_optimizer_process_sets",
    "test_sparse_embeddings",
    "test_synchronize_step_warning",
)


@functools.cache
def run(algorithm: Optional[str], ranks: int, launcher: str) -> Outcome:
    """Run one job with all of ``TESTS``; ``None`` is Horovod's own class."""
    files = [f"{CHECKOUT}/parallel/test_torch.py::TorchTests::{test}" for test in TESTS]
    env = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    if algorithm is not None:
        env["HVD_COMPRESS_ALGORITHM"] = algorithm
    options = ["-q", "-p", "tests.conformance.substitute", "-p", "no:cacheprovider"]
    return launch([sys.executable, "-m", "pytest", *options, *files], ranks, launcher, env=env)


def failures(outcome: Outcome, test: str) -> list[str]:
    """Return the failures of each rank that has some; skip the calling test if every rank skipped it."""
    stories = [notes.get(test, UNKNOWN) for notes in outcome.notes]
    if all(story.startswith("skipped") for story in stories):
        pytest.skip(stories[0])
    return [f"rank {rank}: {story}" for rank, story in enumerate(stories) if story != "ok"]


@pytest.mark.skipif(CHECKOUT is None, reason=HOW)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_torch(ranks: int, algorithm: str, test: str) -> None:
    launcher = "mpi" if algorithm in BY_MPI else "gloo"
    outcome = run(algorithm, ranks, launcher)
    ours = failures(outcome, test)
    if ours:
        theirs = failures(run(None, ranks, launcher), test)
        # A test that did not begin says nothing of Horovod's own optimizer.
        if theirs and not any(UNKNOWN in story for story in theirs):
            pytest.skip(f"Horovod's own optimizer does not pass this test here: {ours[0]}")
    tail = outcome.output[-20000:] if any(UNKNOWN in story for story in ours) else ""
    assert not ours, "\n".join(ours) + tail
