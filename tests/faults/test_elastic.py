"""Elastic Horovod: a rank joins a running job, or leaves it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.multirank.support.harness import environment, supervise

CASES = [
    ("ef", "momentum", 1, 2),
    ("dist-ef", "momentum", 3, 2),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("def", "momentum", 1, 2),
            ("dist-ef", "momentum", 2, 1),
            ("liec", "momentum", 3, 2),
            ("def", "none", 1, 2),
            ("dist-ef", "none", 1, 2),
            ("liec", "none", 1, 2),
            ("def", "momentum", 4, 2),
            ("ef", "momentum", 2, 4),
            ("dist-ef", "momentum", 3, 4),
            ("ef", "none", 2, 1),
            ("liec", "none", 2, 1),
        )
    ),
]


@pytest.mark.parametrize(("name", "momentum", "before", "after"), CASES)
def test_the_number_of_ranks_changes(name: str, momentum: str, before: int, after: int, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"localhost:{before}\n")
    discovery = tmp_path / "discover.sh"
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    binaries = Path(sys.executable).parent
    script = Path(__file__).parent / "elastic.py"
    # Horovod waits for a second host to find common interfaces, unless they are named.
    command = [
        str(binaries / "horovodrun"),
        "--gloo",
        "-np",
        str(before),
        "--min-np",
        "1",
        "--max-np",
        "4",
        "--network-interfaces",
        "lo",
        "--host-discovery-script",
        str(discovery),
        sys.executable,
        str(script),
        str(hosts),
        name,
        momentum,
        f"{before}-{after}",
    ]
    returncode, output = supervise(command, environment(), timeout=300)
    assert returncode == 0, output
    assert output.count(f"finished on {after} ranks") == after, output
    assert "pending updates kept" in output, output
