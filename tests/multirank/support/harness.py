"""Real Horovod jobs from pytest: launch N ranks, run every check of a job file, report per check, case and rank.

A job file in ``jobs/*/`` has functions named ``check_*`` and, if it needs other numbers of ranks than the default, a
tuple ``RANKS`` (``FULL_RANKS``: in ``make test-full`` only; ``MPI_RANKS``: there, by mpirun). The full run has all
cases at ``RANKS``, at three ranks and by mpirun; at others of ``FULL_RANKS`` it has those of the quick run, as all of
them would take hours more. ``PROCESS_SETS = True`` lets a file make process sets; Horovod's readiness for them slows
down every collective by a quarter. All checks of a file run in one job, in order; each rank notes how each case of them
ended, so one launch serves many tests. Starting ranks takes longer than most quick jobs, so those of one folder, with
as many ranks, share a launch.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional

from tests.multirank.support.cases import FULL, Job, calls

ROOT = Path(__file__).parents[3]  # a checkout tests itself, whatever is installed
JOBS = Path(__file__).parents[1] / "jobs"
DEFAULT_RANKS = (2, 3, 4)
ALL_CASES_AT = 3  # of FULL_RANKS: the fewest ranks at which what works for two ranks only fails
TIMEOUT = 600.0
_SELECTED: list[Job] = []
_SHOWN: set[tuple[Job, ...]] = set()


@dataclass(frozen=True)
class Outcome:
    """The end of a job: exit code (None if it was killed), output of all ranks, and each rank's notes by case."""

    returncode: Optional[int]
    output: str
    notes: list[dict[str, str]]


def command(launcher: str, ranks: int, directory: str, argv: list[str]) -> list[str]:
    """Return the command line that starts ``argv`` on ``ranks`` local ranks.

    Raises:
        ValueError: if ``launcher`` is neither "gloo" nor "mpi".
    """
    binaries = Path(sys.executable).parent
    if launcher == "gloo":
        # Horovod 0.28.1 fails on --output-filename with one rank.
        files = ["--output-filename", directory] if ranks > 1 else []
        # Horovod's 30 seconds for a collective are too few on a machine that stalls; our own timeout ends hangs.
        patience = ["--gloo-timeout-seconds", "240", "--network-interfaces", "lo"]
        hosts = ["-np", str(ranks), "-H", f"localhost:{ranks}"]
        return [str(binaries / "horovodrun"), "--gloo", *patience, *hosts, *files, *argv]
    if launcher == "mpi":
        # Open MPI polls while it waits; ranks that share a core must yield it.
        sharing = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return ["mpirun", "--allow-run-as-root", *sharing, "-np", str(ranks), *argv]
    raise ValueError(f"launcher={launcher!r} must be 'gloo' or 'mpi'")


def supervise(
    line: list[str], env: dict[str, str], timeout: float, cwd: Optional[Path] = None
) -> tuple[Optional[int], str]:
    """Run a command; return its exit code and output.

    After ``timeout`` seconds all of its processes are killed and the exit code is None.
    """
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, f"{output}\n--- killed after {timeout:.0f} s ---\n"


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment for a job: our binaries and this checkout first, one thread per rank."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        **changes,
    }


def launch(
    argv: list[str], ranks: int, launcher: str = "gloo", timeout: float = TIMEOUT, env: Optional[dict[str, str]] = None
) -> Outcome:
    """Run ``argv`` as a job; after ``timeout`` seconds the whole job is killed and ``returncode`` is None."""
    with tempfile.TemporaryDirectory(prefix="hvd_compress-") as directory:
        settings = environment(HVD_COMPRESS_NOTES=directory, **(env or {}))
        returncode, output = supervise(command(launcher, ranks, directory, argv), settings, timeout)
        for path in sorted(Path(directory).glob("rank.*/std*")):
            output += f"\n--- {path.parent.name} {path.name} ---\n{path.read_text(errors='replace')}"
        notes = []
        for rank in range(ranks):
            path = Path(directory) / f"notes.{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            notes.append(dict(json.loads(line) for line in lines))
        return Outcome(returncode, output, notes)


def select(jobs: Iterable[Job]) -> None:
    """Say which jobs this run of pytest needs; only these share launches."""
    _SELECTED[:] = dict.fromkeys(jobs)


def launched_with(job: Job) -> tuple[Job, ...]:
    """Return the jobs that share a launch with ``job``: selected quick ones of its folder, with as many ranks."""
    if job.full or job not in _SELECTED:
        return (job,)
    return tuple(other for other in _SELECTED if _sharing(other) == _sharing(job))


def _sharing(job: Job) -> tuple[object, ...]:
    """Return what must be equal for two jobs to share a launch."""
    return (job.folder, job.ranks, job.launcher, job.full, job.makes_process_sets)


@functools.cache
def run_jobs(jobs: tuple[Job, ...]) -> Outcome:
    """Launch jobs that share a launch, once; later calls return the same outcome."""
    first = jobs[0]
    argv = [sys.executable, "-m", "tests.multirank.support.rank", *(job.file for job in jobs)]
    env = {"HVD_COMPRESS_FULL": "1" if first.full else "0"}
    if first.makes_process_sets:
        env["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    # Full jobs do more, with up to four ranks a core.
    timeout = TIMEOUT * (2 if first.full else 1) + 60.0 * (len(jobs) - 1)
    return launch(argv, first.ranks, first.launcher, timeout=timeout, env=env)


def output_of(jobs: tuple[Job, ...]) -> str:
    """Return the end of a launch's output, once: hundreds of cases may fail for the same reason."""
    if jobs in _SHOWN:
        return "\n(the output of this launch is with its first failure)"
    _SHOWN.add(jobs)
    return run_jobs(jobs).output[-20000:]


def files() -> list[str]:
    """Return every job file, as ``Job.file``."""
    paths = sorted(path for path in JOBS.glob("*/*.py") if path.name != "__init__.py")
    return [str(path.relative_to(JOBS).with_suffix("")) for path in paths]


def jobs_of(file: str) -> list[tuple[Job, bool]]:
    """Return the jobs that a file asks for, each with True if it is part of the full run only."""
    module = Job(file, 1, "gloo", FULL).module()
    jobs = [(Job(file, n, "gloo", FULL), False) for n in getattr(module, "RANKS", DEFAULT_RANKS)]
    jobs += [(Job(file, n, "gloo", n == ALL_CASES_AT), True) for n in getattr(module, "FULL_RANKS", ())]
    jobs += [(Job(file, n, "mpi", True), True) for n in getattr(module, "MPI_RANKS", ())]
    return jobs


def collect() -> list[tuple[Job, str, bool]]:
    """Return (job, name of a check and case, True if in the full run only) for all job files."""
    found = [(job, marked) for file in files() for job, marked in jobs_of(file)]
    return [(job, name, marked) for job, marked in found for name in calls(job.module(), job)]


def verify(job: Job, name: str) -> None:
    """Fail with every rank's traceback unless all ranks noted that this check and case passed.

    Raises:
        AssertionError: if a rank noted a failure or nothing, or if the job's exit code is not 0.
    """
    jobs = launched_with(job)
    outcome = run_jobs(jobs)
    stories = []
    for rank, notes in enumerate(outcome.notes):
        story = notes.get(f"{job.file}: {name}", "never finished (or never began)")
        if story != "ok":
            stories.append(f"rank {rank}: {story}")
    where = f"{job.file}: {name} at {job.ranks} ranks ({job.launcher})"
    if stories:
        tail = output_of(jobs) if any("never" in s for s in stories) else ""
        raise AssertionError("\n".join([where, *stories]) + tail)
    if outcome.returncode != 0:
        raise AssertionError(f"{where}: the job ended with {outcome.returncode}\n{output_of(jobs)}")
