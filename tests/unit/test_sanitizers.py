"""The compiled loops under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the unit tests that use them."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.unit.sanitized import ROOT, build

FILES = [
    "count_sketch",
    "count_sketch_finds",
    "fixed_order",
    "low_rank",
    "overwritten",
    "random_k",
    "received",
    "residual_update",
    "sign",
    "sign_shards",
    "topk",
]
REPORTS = ("AddressSanitizer", "runtime error:")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that uses a build with sanitizers."""
    return build(tmp_path_factory.mktemp("sanitized"))


def run(argv: list[str], env: dict[str, str], timeout: float) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        errors="replace",
    )
    return done.returncode, done.stdout


def test_a_planted_overflow_is_found(sanitized: dict[str, str]) -> None:
    script = textwrap.dedent("""
        import sys, torch
        from hvd_compress import native
        x, e, out = (torch.zeros(1000) for _ in range(3))
        print(native._kernels.__file__)
        native._kernels.detached_point(x.data_ptr(), e.data_ptr(), out.data_ptr(), 1000 + int(sys.argv[1]), 0.5)
        print("to the end")
    """)
    code, output = run(["-c", script, "0"], sanitized, 300)
    assert (code, output.splitlines()[-1]) == (0, "to the end"), output
    assert sanitized["HVD_COMPRESS_NATIVE"] in output
    code, output = run(["-c", script, "1"], sanitized, 300)
    assert code != 0, output
    assert "heap-buffer-overflow" in output, output
    assert "detached_point" in output, output


@pytest.mark.parametrize("name", FILES)
def test_no_report_in(name: str, sanitized: dict[str, str]) -> None:
    """Without pytest's capturing, so that a report is part of the output when the process ends."""
    file = f"tests/unit/test_{name}.py"
    code, output = run(["-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", file], sanitized, 1800)
    assert not any(report in output for report in REPORTS), output[-20000:]
    assert code == 0, output[-20000:]
    assert " passed" in output, output[-2000:]
