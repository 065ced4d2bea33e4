"""The package, setup.py and CITATION.cff name one version."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

import hvd_compress

ROOT = Path(__file__).resolve().parents[2]


def test_setup_py_reads_the_version_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [hvd_compress.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+", hvd_compress.__version__)


def test_the_citation_has_the_version_and_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == hvd_compress.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    references = " ".join(readme.partition("## References")[2].split())
    assert len(citation["references"]) == references.count("- ")
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert reference["title"] in references
