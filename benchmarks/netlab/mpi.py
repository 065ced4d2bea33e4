"""Run one Horovod rank (MPI) on every host of a virtual cluster, to test functions and count bytes, not for speed.

Open MPI polls while it waits, so ranks that share a core slow each other down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cluster import Cluster, NetlabError

_AGENT = Path(__file__).with_name("agent.py")
_TAIL = 3000


def launch_mpi(
    cluster: Cluster, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 600.0
) -> str:
    """Run argv (script first) by mpirun, started on host 1; return the standard output of all ranks.

    Raises NetlabError if there is no mpirun, a rank fails or the time is up.
    """
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise NetlabError(f"mpirun is neither beside {sys.executable} nor on PATH: is an MPI installed?")
    network = f"{cluster.address(0).rsplit('.', 1)[0]}.0/24"
    addresses = ",".join(f"{cluster.address(host)}:1" for host in range(1, cluster.hosts + 1))
    settings = {
        "plm_rsh_agent": f"{sys.executable} {_AGENT}",
        "plm_rsh_no_tree_spawn": "1",
        "pml": "ob1",
        "btl": "tcp,self",
        "btl_tcp_if_include": network,
        "oob_tcp_if_include": network,
        "mpi_yield_when_idle": "1",
    }
    exported = {"NETLAB_CLUSTER": cluster.name, "OMP_NUM_THREADS": "1", **(env or {})}
    line = [mpirun, "--allow-run-as-root", "-np", str(cluster.hosts), "-H", addresses, "--bind-to", "none"]
    line += [word for pair in settings.items() for word in ("--mca", *pair)]
    line += [word for name in exported for word in ("-x", name)]
    try:
        done = subprocess.run(
            cluster.command(1, [*line, sys.executable, *argv]),
            env={**os.environ, **exported},
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise NetlabError(f"no end within {timeout:g} s: {' '.join(argv)}\n{str(late.stderr)[-_TAIL:]}") from late
    if done.returncode:
        raise NetlabError(f"mpirun ended with exit code {done.returncode}\n{(done.stdout + done.stderr)[-_TAIL:]}")
    return done.stdout
