"""The CI workflow agrees with the Makefile, setup.py and the script that installs the environment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
SETUP_ENV = (ROOT / "scripts" / "setup_env.sh").read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def metadata(field: str) -> list[str]:
    """Return the lines that setup.py prints for a field of the package's metadata."""
    done = subprocess.run([sys.executable, "setup.py", field], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def steps() -> Iterator[dict[str, Any]]:
    """Yield the steps of all jobs and of the action that the jobs share."""
    for job in read(GITHUB / "workflows" / "ci.yml")["jobs"].values():
        yield from job["steps"]
    yield from read(GITHUB / "actions" / "environment" / "action.yml")["runs"]["steps"]


def matrix() -> list[tuple[str, str]]:
    """Return the pairs (Python, torch) that the tests run on."""
    given = read(GITHUB / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    pairs = [{"python": python, "torch": torch} for python in given["python"] for torch in given["torch"]]
    assert all(pair in pairs for pair in given["exclude"])
    return [(pair["python"], pair["torch"]) for pair in pairs if pair not in given["exclude"]]


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    used = [target for step in steps() for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))]
    assert {"setup", "lint", "test-only"} <= set(used) <= set(targets)


def test_every_local_action_exists() -> None:
    local = [step["uses"] for step in steps() if step.get("uses", "").startswith("./")]
    assert local
    for path in local:
        assert (ROOT / path / "action.yml").exists(), path


def test_the_matrix_has_every_python_of_setup_py() -> None:
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in metadata("--classifiers")]
    pythons = [match.group(1) for match in found if match]
    assert pythons[0] == "3.9"
    assert sorted({python for python, _ in matrix()}, key=pythons.index) == pythons


def test_the_matrix_has_the_oldest_and_the_newest_torch() -> None:
    oldest = re.search(r'"torch>=([0-9.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert oldest is not None
    versions = {torch for _, torch in matrix()}
    # An empty version is the newest that the script knows for the Python.
    assert versions == {f"torch=={oldest.group(1)}.0", ""}
    assert 'if [ -z "${TORCH:-}" ]; then\n  case $pyver in' in SETUP_ENV


def test_the_cached_directory_is_the_one_of_the_script() -> None:
    (cache,) = [step["with"] for step in steps() if step.get("uses", "").startswith("actions/cache")]
    assert cache["path"] == "~/.cache/hvd_compress"
    assert "CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd_compress}" in SETUP_ENV
    assert all(f"inputs.{name}" in cache["key"] for name in ("python", "torch"))
    assert "hashFiles('scripts/setup_env.sh')" in cache["key"]


@pytest.mark.parametrize(
    "hook", read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"], ids=lambda hook: hook["id"]
)
def test_pre_commit_runs_what_make_lint_runs(hook: dict[str, Any]) -> None:
    command = hook["entry"].replace(".venv/bin/", "$(VENV)/bin/").removesuffix(" --force-exclude")
    assert command in (ROOT / "Makefile").read_text(encoding="utf-8")
