"""The public face and the house rules: names, Horovod's signature, who may import what, files of one idea."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch

import hvd_compress

ROOT = Path(hvd_compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MAX_LINES = 320

files = pytest.mark.parametrize("path", FILES, ids=NAMES)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; ``from a import b`` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute in this house"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def imports(path: Path, package: str) -> list[str]:
    return sorted(name for name in imported(path) if name == package or name.startswith(f"{package}."))


# -- names ---------------------------------------------------------------------------------------------


def test_every_public_name_exists_once() -> None:
    assert len(hvd_compress.__all__) == len(set(hvd_compress.__all__))
    for name in hvd_compress.__all__:
        assert getattr(hvd_compress, name) is not None
    wanted = {
        "DistributedOptimizer",
        "Dense",
        "EF",
        "DEF",
        "RandomBlock",
        "Identity",
        "Cast",
        "Stats",
        "Compression",
        "Average",
        "Sum",
        "Adasum",
        "ProcessSet",
        "global_process_set",
        "BlockSign",
        "RandomK",
        "TopK",
    }
    assert wanted <= set(hvd_compress.__all__)


def test_a_star_import_brings_nothing_else() -> None:
    scope: dict[str, object] = {}
    exec("from hvd_compress import *", scope)
    assert set(scope) - {"__builtins__"} == set(hvd_compress.__all__)


def test_modules_are_found_where_they_are() -> None:
    """What compressors/ makes public must not hide a module of the package, were a file there to be called alike."""
    modules = {name: value.__name__ for name, value in vars(hvd_compress).items() if inspect.ismodule(value)}
    assert modules
    assert modules == {name: f"hvd_compress.{name}" for name in modules}


@pytest.mark.parametrize("name", hvd_compress.__all__)
def test_public_classes_and_functions_are_documented(name: str) -> None:
    thing = getattr(hvd_compress, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert (thing.__doc__ or "").strip()
        assert not (thing.__doc__ or "").startswith(f"{name}("), "a dataclass's automatic docstring"


def test_packages_list_what_they_export() -> None:
    module = importlib.import_module("hvd_compress.algorithms")
    public = {name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(module.__all__)


def test_compressors_are_public_by_one_line_each() -> None:
    module = importlib.import_module("hvd_compress.compressors")
    lines = (ROOT / "compressors" / "__init__.py").read_text(encoding="utf-8").splitlines()
    imported = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("from")]
    assert all(line.endswith(f"import {name} as {name}") for line, name in zip(lines[-len(imported) :], imported))
    found = {n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, module.Compressor)}
    assert found <= set(imported) & set(hvd_compress.__all__)


def test_horovods_own_objects_are_passed_on() -> None:
    for name in ("Adasum", "Average", "Sum", "Compression", "ProcessSet", "global_process_set"):
        assert getattr(hvd_compress, name) is getattr(hvd, name)


# -- Horovod's contract --------------------------------------------------------------------------------


def test_the_signature_is_horovods() -> None:
    """Names, order, kinds and defaults: one line of a script is replaced, positional arguments included."""
    ours = inspect.signature(hvd_compress.DistributedOptimizer).parameters.values()
    theirs = inspect.signature(hvd.DistributedOptimizer).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_without_init_the_remedy_is_named() -> None:
    assert not hvd.is_initialized(), "unit tests run without Horovod"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"call hvd\.init\(\) first"):
        hvd_compress.DistributedOptimizer(optimizer)


# -- house rules ---------------------------------------------------------------------------------------


@files
def test_only_collectives_imports_horovod(path: Path) -> None:
    assert bool(imports(path, "horovod")) == (path == ROOT / "collectives.py")


@files
def test_only_mpi_imports_mpi4py(path: Path) -> None:
    assert path == ROOT / "mpi.py" or not imports(path, "mpi4py")


@files
def test_compressors_are_mathematics_only(path: Path) -> None:
    """No network, no optimizer, no algorithm: of this package they see their own, compiled loops and checks."""
    if path.parent != ROOT / "compressors":
        assert not [n for n in imported(path) if n.startswith("hvd_compress.compressors.") and "._" in n]
        return
    own = imports(path, "hvd_compress")
    allowed = ("hvd_compress.compressors", "hvd_compress.native", "hvd_compress.validation")
    assert [n for n in own if n != "hvd_compress" and not n.startswith(allowed)] == []
    assert not imports(path, "torch.distributed")


@files
def test_algorithms_know_nothing_of_hooks(path: Path) -> None:
    if path.parent == ROOT / "algorithms":
        above = ("hvd_compress.optimizer", "hvd_compress.reducer", "hvd_compress.consensus", "hvd_compress.residuals")
        assert [n for n in imports(path, "hvd_compress") if n.startswith(above)] == []
    elif path.parent == ROOT:
        assert "register_hook" not in path.read_text(encoding="utf-8") or path.name in ("amp.py", "reducer.py")


@files
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert (ast.get_docstring(ast.parse(text)) or "").strip()


def test_the_rules_have_something_to_rule() -> None:
    assert {"collectives.py", "compressors/random_block.py", "algorithms/detached.py", "optimizer.py"} <= set(NAMES)
    assert imports(ROOT / "collectives.py", "horovod") == ["horovod.torch"]
    assert "hvd_compress.validation" in imported(ROOT / "compressors" / "random_block.py")
