"""Real Horovod jobs from pytest: launch N ranks, run every check of a job file, report per check and rank.

A job file in ``jobs/`` has functions named ``check_*`` and, if it wants other numbers of ranks than the
default, a tuple ``RANKS`` (``FULL_RANKS``: in ``make test-full`` only; ``MPI_RANKS``: there, by mpirun). All
checks of a file run in one job, in order; each rank notes how each of them ended, so one launch serves
many tests.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # a checkout tests itself, whatever is installed
JOBS = HERE / "jobs"
DEFAULT_RANKS = (2, 3, 4)
TIMEOUT = 600.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit code, everything every rank printed, and what each rank noted per check."""

    returncode: Optional[int]
    output: str
    notes: list[dict[str, str]]


def command(launcher: str, ranks: int, directory: str, argv: list[str]) -> list[str]:
    """The command line that starts ``argv`` on ``ranks`` local ranks."""
    binaries = Path(sys.executable).parent
    if launcher == "gloo":
        # Horovod 0.28.1 fails on --output-filename with one rank.
        files = ["--output-filename", directory] if ranks > 1 else []
        # Its 30 seconds for a collective are too few on a machine that stalls; our own timeout ends what hangs.
        patience = ["--gloo-timeout-seconds", "240", "--network-interfaces", "lo"]
        hosts = ["-np", str(ranks), "-H", f"localhost:{ranks}"]
        return [str(binaries / "horovodrun"), "--gloo", *patience, *hosts, *files, *argv]
    if launcher == "mpi":
        # Open MPI polls while it waits; ranks that share a core must let each other have it.
        sharing = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        return ["mpirun", "--allow-run-as-root", *sharing, "-np", str(ranks), *argv]
    raise ValueError(f"launcher={launcher!r} must be 'gloo' or 'mpi'")


def supervise(
    line: list[str], env: dict[str, str], timeout: float, cwd: Optional[Path] = None
) -> tuple[Optional[int], str]:
    """Exit code and output of a command; after ``timeout`` seconds all of it is killed and the code is None."""
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


def launch(
    argv: list[str], ranks: int, launcher: str = "gloo", timeout: float = TIMEOUT, env: Optional[dict[str, str]] = None
) -> Outcome:
    """Run ``argv`` as a job; after ``timeout`` seconds the whole job is killed and ``returncode`` is None."""
    with tempfile.TemporaryDirectory(prefix="hvd_compress-") as directory:
        settings = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HVD_COMPRESS_NOTES": directory,
            "PYTHONPATH": f"{HERE}:{ROOT}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
            **(env or {}),
        }
        returncode, output = supervise(command(launcher, ranks, directory, argv), settings, timeout)
        for path in sorted(Path(directory).glob("rank.*/std*")):
            output += f"\n--- {path.parent.name} {path.name} ---\n{path.read_text(errors='replace')}"
        notes = []
        for rank in range(ranks):
            path = Path(directory) / f"notes.{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            notes.append(dict(json.loads(line) for line in lines))
        return Outcome(returncode, output, notes)


@functools.cache
def run_job(path: Path, ranks: int, launcher: str, full: bool) -> Outcome:
    """One launch of a job file; later calls return the same outcome."""
    full = full or os.environ.get("HVD_COMPRESS_FULL") == "1"  # as make test-full says: all checks in full
    env = {"HVD_COMPRESS_FULL": "1"} if full else {}
    # Full jobs do more, with up to four ranks a core.
    return launch([sys.executable, str(path)], ranks, launcher, timeout=TIMEOUT * (2 if full else 1), env=env)


def collect() -> list[tuple[Path, int, str, str, bool]]:
    """(file, ranks, launcher, check, only in the full run) of every check of every job file."""
    found: list[tuple[Path, int, str, str, bool]] = []
    for path in sorted(JOBS.glob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("RANKS", "FULL_RANKS", "MPI_RANKS")
        }
        checks = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("check_")]
        jobs = [(n, "gloo", False) for n in constants.get("RANKS", DEFAULT_RANKS)]
        jobs += [(n, "gloo", True) for n in constants.get("FULL_RANKS", ())]
        jobs += [(n, "mpi", True) for n in constants.get("MPI_RANKS", ())]
        found += [(path, ranks, launcher, check, full) for ranks, launcher, full in jobs for check in checks]
    return found


def verify(path: Path, ranks: int, launcher: str, check: str, full: bool) -> None:
    """Fail with every rank's story unless all ranks noted that ``check`` went well."""
    outcome = run_job(path, ranks, launcher, full)
    stories = []
    for rank, notes in enumerate(outcome.notes):
        story = notes.get(check, "never finished (or never began)")
        if story != "ok":
            stories.append(f"rank {rank}: {story}")
    if stories:
        tail = outcome.output if any("never" in s for s in stories) else ""
        where = f"{path.name}:{check} at {ranks} ranks ({launcher})"
        raise AssertionError("\n".join([where, *stories]) + tail[-20000:])
    if outcome.returncode != 0:
        ending = f"{path.name} at {ranks} ranks ended with {outcome.returncode}"
        raise AssertionError(f"{ending}\n{outcome.output[-20000:]}")


def main(namespace: dict[str, Any]) -> None:
    """ParamEntry of a job file: run its checks on this rank and note how each ended."""
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    hvd.init()
    checks: list[Callable[[], None]] = [
        value for key, value in namespace.items() if key.startswith("check_") and inspect.isfunction(value)
    ]
    with open(f"{os.environ['HVD_COMPRESS_NOTES']}/notes.{hvd.rank()}.jsonl", "w") as notes:
        for check in checks:
            print(f"{check.__name__} ...", flush=True)
            try:
                check()
                story = "ok"
            except BaseException:
                story = traceback.format_exc()
                print(story, flush=True)
            notes.write(json.dumps([check.__name__, story]) + "\n")
            notes.flush()
