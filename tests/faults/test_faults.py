"""Whatever happens to a rank, at any phase of a step: the others end in time, with an error that says who and where."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.netlab import run_on_cluster, why_unavailable
from tests.faults import ranks, scenarios
from tests.multirank.support.harness import environment, launch

# A rank that has been stopped answers never; Gloo needs its own limit before Horovod can shut down.
LIMIT, GLOO_LIMIT = 10.0, 15.0
LIMITS = {"HVD_COMPRESS_TIMEOUT_SECONDS": f"{LIMIT:g}", "HOROVOD_GLOO_TIMEOUT_SECONDS": f"{GLOO_LIMIT:g}"}
SLACK = 20.0  # of a machine that does much else
QUICK = {
    ("allreduce", "forward", "raise"),
    ("servers", "exchange", "kill"),
    ("allgather", "optimizer", "kill"),
    ("sketch", "backward", "raise"),
    ("local-models", "consensus", "kill"),
    ("updates", "synchronize", "stop"),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else (pytest.mark.full,), id="-".join(case))
    for case in itertools.product(scenarios.EXCHANGES, scenarios.PHASES, scenarios.FAULTS)
]


def explained(rank: int, phase: str) -> str:
    """Return a pattern of the error of a rank that another has left alone."""
    method, what = re.escape(scenarios.PHASES[phase]), "(allreduce|allgather|alltoall|message)"
    return rf"HorovodInternalError: .*\(rank {rank}, {method} after \d exchanges, {what} "


@pytest.mark.parametrize(("exchange", "phase", "fault"), CASES)
def test_others_end_with_an_error(exchange: str, phase: str, fault: str, tmp_path: Path) -> None:
    arguments = (exchange, phase, fault, str(tmp_path))
    survivor, faulty = ranks.run(scenarios.train, arguments, 2, tmp_path, LIMITS, GLOO_LIMIT + 2 * SLACK)
    what = f"{survivor}\n{faulty}\n{survivor.output}\n{faulty.output}"
    assert survivor.exitcode == 1, what
    assert re.match(explained(0, phase), survivor.error), what
    happened = (tmp_path / "fault").stat().st_mtime
    assert survivor.raised_at - happened < LIMIT + SLACK, what
    assert faulty.exitcode == {"raise": 1, "kill": -9, "stop": None}[fault], what
    assert "trained to the end" not in survivor.output + faulty.output, what
    for rank in (0, 1):
        checkpoint = torch.load(tmp_path / f"checkpoint.{rank}", weights_only=False)
        assert set(checkpoint) == {"model", "optimizer"}
        assert checkpoint["optimizer"]["hvd_compress"]["step"] == scenarios.STEP


@pytest.mark.full
@pytest.mark.parametrize(
    ("exchange", "phase"),
    [*((exchange, "forward") for exchange in scenarios.EXCHANGES), *((tree, "exchange") for tree in scenarios.TREES)],
)
def test_a_rank_stops_under_mpi(exchange: str, phase: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.faults.scenarios", exchange, phase, "stop", str(tmp_path)]
    outcome = launch(argv, 2, "mpi", timeout=LIMIT + 5 * SLACK, env=LIMITS)
    assert outcome.returncode not in (None, 0), outcome.output
    assert re.search(explained(0, phase), outcome.output), outcome.output


REASON = why_unavailable()


@pytest.mark.skipif(REASON is not None, reason=f"a virtual cluster cannot be made here: {REASON}")
@pytest.mark.parametrize(
    ("exchange", "phase"),
    [
        ("updates", "exchange"),
        *(
            pytest.param(exchange, phase, marks=pytest.mark.full)
            for exchange, phase in itertools.product(scenarios.EXCHANGES, ("forward", "exchange", "consensus"))
            if (exchange, phase) != ("updates", "exchange")
        ),
    ],
)
def test_a_lost_link(exchange: str, phase: str, tmp_path: Path) -> None:
    argv = ["-m", "tests.faults.scenarios", exchange, phase, "unlink", str(tmp_path)]
    run = run_on_cluster(2, None, argv, {**environment(), **LIMITS}, timeout=GLOO_LIMIT + 4 * SLACK, check=False)
    assert (tmp_path / "fault").exists(), run
    assert run.failure is not None, run
    assert "still running" not in run.failure, run
    for end in run.ranks:
        assert re.search(explained(end.rank, phase), end.stderr), end.stderr
