"""The code in the documentation can be run, and docstrings are where ruff's rules cannot ask for them."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import hvd_compress

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "algorithms.md"
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


def public_members() -> dict[str, object]:
    """Return the public methods and properties of the package's public classes by their full names."""
    members = {}
    for found in pkgutil.walk_packages(hvd_compress.__path__, "hvd_compress."):
        for cls in vars(importlib.import_module(found.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != found.name or cls.__name__.startswith("_"):
                continue
            for name, value in vars(cls).items():
                kinds = (property, classmethod, staticmethod)
                if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds)):
                    members[f"{found.name}.{cls.__name__}.{name}"] = getattr(cls, name)
    return members


def test_every_public_method_is_documented() -> None:
    """A method that overrides another inherits its docstring, which ruff's D102 does not know."""
    members = public_members()
    assert "hvd_compress.compressors.topk.TopK.encode" in members
    assert [name for name, member in members.items() if not inspect.getdoc(member)] == []


@pytest.mark.parametrize("folder", ["hvd_compress", "examples", "benchmarks", "scripts"])
def test_docstrings_say_what_is_done(folder: str) -> None:
    """An imperative verb or a noun comes first; ruff's D401 lets these words pass."""
    beginning = re.compile(r"(What|Whether|Where|How|As)\b")
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}": ast.get_docstring(node) or ""
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, nodes)
    }
    assert any(docstrings.values())
    assert [place for place, text in docstrings.items() if beginning.match(text)] == []
