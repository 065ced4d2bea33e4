"""The code in the documentation can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hvd_compress

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("(")[0])
def test_blocks_run(block: str) -> None:
    exec(block, dict(vars(hvd_compress)))


def test_every_public_algorithm_and_compressor_is_described() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in hvd_compress.__all__:
        value = getattr(hvd_compress, name)
        described = isinstance(value, type) and issubclass(value, (hvd_compress.Algorithm, hvd_compress.Compressor))
        if described and name not in ("Algorithm", "Compressor"):
            assert f"{name}(" in text, name
