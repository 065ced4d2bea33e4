"""Arbitrary and nearly sound bytes for every reader: by hypothesis always, by a coverage-guided fuzzer for a minute."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.unit.sanitized import ROOT, build

SECONDS = 60  # of all targets together
names = pytest.mark.parametrize("name", targets.TARGETS)


@names
@given(data=st.data())
def test_bytes_are_refused_or_used(name: str, data: st.DataObject) -> None:
    sound = data.draw(st.sampled_from([b"", *targets.seeds(name)]))
    changes = data.draw(st.lists(st.tuples(st.integers(0, 255), st.binary(min_size=1, max_size=4)), max_size=3))
    changed = bytearray(sound)
    for place, content in changes:
        at = place % (len(changed) + 1)
        changed[at : at + len(content)] = content
    targets.TARGETS[name](bytes(changed))
    targets.TARGETS[name](data.draw(st.binary(max_size=200)))


@names
def test_sound_bytes_are_used(name: str) -> None:
    assert targets.seeds(name)
    for content in targets.seeds(name):
        targets.TARGETS[name](content)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that uses compiled loops with sanitizers."""
    return build(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed (pip install hvd_compress[fuzz]); it has no wheel for every Python",
)
@names
def test_a_coverage_guided_fuzzer_finds_nothing(name: str, tmp_path: Path, sanitized: dict[str, str]) -> None:
    seconds = max(4, SECONDS // len(targets.TARGETS))
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.harness", name, str(tmp_path / "corpus"), *options],
        cwd=ROOT,
        env=sanitized,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"Done [1-9]\d+ runs", done.stdout), done.stdout[-2000:]
