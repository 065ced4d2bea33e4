"""Run one Horovod rank (Gloo) on every host of a virtual cluster.

If a rank fails or the time is up, the other ranks are killed and the run is a failure.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from .cluster import INTERFACE, Cluster, NetlabError

_RENDEZVOUS = Path(__file__).with_name("rendezvous.py")
_PATIENCE = 3.0  # seconds that other ranks get to fail by themselves, and then to react to SIGTERM
# Variables that an enclosing job may have set and that a rank would obey.
_FOREIGN = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "SLURM_")


@dataclass(frozen=True)
class RankResult:
    """Result of one rank: exit code (negative: signal), its output, and its host's interface counters."""

    rank: int
    returncode: int
    stdout: str
    stderr: str
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)
class ClusterRun:
    """Outcome of a run; ``failure`` is one line about the first failure, or None."""

    ranks: tuple[RankResult, ...]
    failure: str | None
    seconds: float

    @property
    def returncode(self) -> int:
        """0, or 1 if any rank failed or the time was up."""
        return 1 if self.failure else 0

    @property
    def stdout(self) -> list[str]:
        """The standard output of each rank."""
        return [rank.stdout for rank in self.ranks]


class RunFailed(RuntimeError):
    """Failure of a rank, or timeout; ``run`` has the output of all ranks."""

    def __init__(self, run: ClusterRun) -> None:
        tails = "".join(f"\n--- rank {r.rank} (exit {r.returncode}) ---\n{r.stderr[-2000:]}" for r in run.ranks)
        super().__init__(f"{run.failure}{tails}")
        self.run = run


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    def listen(self, echo: bool) -> None:
        for stream, kept, shown in (
            (self.process.stdout, self.out, sys.stdout),
            (self.process.stderr, self.err, sys.stderr),
        ):
            assert stream is not None
            target = shown if echo else None
            thread = threading.Thread(target=_keep, args=(stream, kept, target, f"[{self.rank}] "), daemon=True)
            thread.start()
            self.readers.append(thread)


def _keep(stream: IO[str], kept: list[str], shown: IO[str] | None, prefix: str) -> None:
    for line in stream:
        kept.append(line)
        if shown is not None:
            print(prefix + line.rstrip("\n"), file=shown, flush=True)


def run_on_cluster(
    n: int,
    rate: float | None,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    echo: bool = False,
    check: bool = True,
) -> ClusterRun:
    """Bring up n hosts with links of `rate` Mbit/s (None: unlimited), run argv as a rank on each, clean up.

    argv starts with the script (or "-c", "-m"): the interpreter is this process's own. `env` is added to
    this process's environment. With `check` a failure raises RunFailed, else the result has it.
    """
    with Cluster(n, rate) as cluster:
        return launch(cluster, argv, env, timeout, echo, check)


def launch(
    cluster: Cluster,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    echo: bool = False,
    check: bool = True,
) -> ClusterRun:
    """Run argv as one rank on each host of a cluster that is up; see run_on_cluster."""
    started = time.monotonic()
    base = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    base.setdefault("OMP_NUM_THREADS", "1")
    base["PYTHONUNBUFFERED"] = "1"
    base.update(env or {})
    before = cluster.counters()
    server = _spawn(cluster, 0, [sys.executable, str(_RENDEZVOUS), *map(cluster.address, _hosts(cluster))], base)
    ranks: list[_Rank] = []
    try:
        port = _port_of(server)
        for host in _hosts(cluster):
            placed = {**base, **_placement(cluster, host, port)}
            ranks.append(_Rank(host - 1, _spawn(cluster, host, [sys.executable, *argv], placed)))
            ranks[-1].listen(echo)
        failure = _wait(ranks, started + timeout, timeout)
    finally:
        _end([rank.process for rank in ranks])
        _end([server])
    for rank in ranks:
        for reader in rank.readers:
            reader.join(_PATIENCE)
    traffic = [after - earlier for after, earlier in zip(cluster.counters(), before)]
    results = tuple(
        RankResult(r.rank, r.process.returncode, "".join(r.out), "".join(r.err), link.sent, link.received)
        for r, link in zip(ranks, traffic)
    )
    run = ClusterRun(results, failure, time.monotonic() - started)
    if check and failure:
        raise RunFailed(run)
    return run


def _hosts(cluster: Cluster) -> range:
    return range(1, cluster.hosts + 1)


def _placement(cluster: Cluster, host: int, port: int) -> dict[str, str]:
    rank, size = str(host - 1), str(cluster.hosts)
    return {
        "HOROVOD_HOSTNAME": cluster.address(host),
        "HOROVOD_RANK": rank,
        "HOROVOD_SIZE": size,
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_RANK": rank,
        "HOROVOD_CROSS_SIZE": size,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": cluster.address(0),
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": INTERFACE,
    }


def _spawn(cluster: Cluster, host: int, argv: list[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    command = cluster.command(host, argv)
    if shutil.which("setpriv"):  # so that ranks end with a launcher that is killed by SIGKILL
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    # The pipe as standard input tells the rendezvous server when to stop; ranks get none.
    stdin = subprocess.PIPE if host == 0 else subprocess.DEVNULL
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if host else None,
        text=True,
        start_new_session=True,
    )


def _port_of(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line.strip().isdigit():
        raise NetlabError("the rendezvous server did not start; is Horovod installed in this environment?")
    return int(line)


def _wait(ranks: list[_Rank], deadline: float, timeout: float) -> str | None:
    """Wait for all ranks; return None, or the first failure as soon as it is seen."""
    while True:
        codes = [rank.process.poll() for rank in ranks]
        failed = [f"rank {i} ended with exit code {code}" for i, code in enumerate(codes) if code]
        if failed:
            # One failure breaks the others' connections: wait a moment, so that they can report it themselves.
            _wait_all([rank.process for rank in ranks], _PATIENCE)
            return "; ".join(failed)
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            unfinished = [i for i, code in enumerate(codes) if code is None]
            return f"no end within {timeout:g} s: ranks {unfinished} were still running"
        time.sleep(0.05)


def _wait_all(processes: list[subprocess.Popen[str]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(0.02)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """End process groups that we started, by SIGTERM and then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [p for p in processes if p.poll() is None]
        for process in running:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue  # it has ended by itself in the meantime
        _wait_all(running, _PATIENCE)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the program like Ctrl-C, so that the cluster is taken down."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
