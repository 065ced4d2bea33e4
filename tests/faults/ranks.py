"""Ranks of a Horovod job that nothing ends but themselves, so that each can be seen to end with an error of its own.

horovodrun and mpirun end all ranks as soon as one has failed. These are forked from a server that has imported
everything, which takes a second where a launch takes ten.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import horovod.torch as hvd
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.faults.scenarios"])


@dataclass(frozen=True)
class End:
    """The end of one rank.

    Attributes:
        exitcode: exit code, negative for a signal; None if the rank had to be killed.
        error: class and message of the exception that ended it, or "".
        raised_at: when that was, in seconds since the epoch; 0 if there was none.
        output: standard output and error.
    """

    exitcode: Optional[int]
    error: str
    raised_at: float
    output: str


def run(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    ranks: int,
    directory: Path,
    env: Mapping[str, str],
    timeout: float,
) -> list[End]:
    """Call ``target(*arguments)`` on local ranks, over Gloo, until each has ended or is stopped; kill what is left.

    Args:
        directory: where ranks write their output.
        env: changes of their environment.
        timeout: seconds after which they are killed in any case.
    """
    plan = RendezvousServer(0)
    port = plan.start()
    plan.init(get_host_assignments(parse_hosts(f"localhost:{ranks}"), ranks))
    places = [{**_place(rank, ranks, port), **env} for rank in range(ranks)]
    try:
        started = [
            _SERVER.Process(target=_rank, args=(target, arguments, place, str(directory / str(rank))))
            for rank, place in enumerate(places)
        ]
        for process in started:
            process.start()
        latest = time.monotonic() + timeout
        while any(_runs(process) for process in started) and time.monotonic() < latest:
            time.sleep(0.05)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        _require_gone([process.pid for process in started if process.pid is not None])
    finally:
        plan.stop()
    return [_end(directory / str(rank), code) for rank, code in enumerate(codes)]


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(ranks),
        "HOROVOD_LOCAL_RANK": str(rank),
        "HOROVOD_LOCAL_SIZE": str(ranks),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": "lo",
    }


def _rank(target: Callable[..., None], arguments: tuple[Any, ...], env: Mapping[str, str], path: str) -> None:
    output = os.open(f"{path}.output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    try:
        hvd.init()
        target(*arguments)
    except BaseException as error:
        Path(f"{path}.error").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        hvd.shutdown()  # as Horovod does when an interpreter exits


def _runs(process: Any) -> bool:
    """Return whether a process has neither ended nor been stopped."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return process.is_alive() and stat.rpartition(")")[2].split()[0] != "T"


def _end(path: Path, code: Optional[int]) -> End:
    error, output = path.with_suffix(".error"), path.with_suffix(".output")
    raised = error.exists()
    return End(
        code,
        error.read_text() if raised else "",
        error.stat().st_mtime if raised else 0.0,
        output.read_text(errors="replace") if output.exists() else "",
    )


def _require_gone(pids: list[int]) -> None:
    """Fail if a process is still there after a while, be it only as a zombie."""
    for _ in range(100):
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes are left: {left}")
