"""Elastic Horovod: a rank joins a running job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multirank.harness import HERE


@pytest.mark.parametrize(("name", "momentum"), [("def", "momentum"), ("ef", "momentum"), ("def", "none")])
def test_a_rank_joins(name: str, momentum: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:1\n")
    discovery = tmp_path / "discover.sh"
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    binaries = Path(sys.executable).parent
    script = Path(__file__).parent / "elastic.py"
    # Horovod waits for a second host to find common interfaces, unless they are named.
    command = [
        str(binaries / "horovodrun"), "--gloo", "-np", "1", "--min-np", "1", "--max-np", "2",
        "--network-interfaces", "lo", "--host-discovery-script", str(discovery),
        sys.executable, str(script), str(hosts), name, momentum,
    ]
    settings = {
        **os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"killed after 150 s\n{output}")
    assert process.returncode == 0, output
    assert output.count("finished on 2 ranks") == 2, output
    assert "residual kept" in output, output
