"""A build of the compiled loops with AddressSanitizer and UndefinedBehaviorSanitizer, in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CC", "gcc").split()[0]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"


def build(place: Path) -> dict[str, str]:
    """Build the loops into ``place`` and return the environment that uses them; skip the test without a compiler."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER} to compile the loops with")
    library = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip(f"{COMPILER} has no libasan.so")
    env = {**os.environ, "CC": COMPILER, "CFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(place),
        "--build-temp",
        str(place / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    built = place / "hvd_compress" / "native"
    assert len(list(built.glob("_*.so"))) == 3, done.stdout + done.stderr
    return {
        **os.environ,
        "LD_PRELOAD": library,
        # Python itself does not free everything.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HVD_COMPRESS_NATIVE": str(built),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
