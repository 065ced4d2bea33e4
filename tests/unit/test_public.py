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
    """A name that compressors/ makes public must not hide a module, were a file there to be called alike."""
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


FACTORIES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "randperm", "tensor", "zeros"}


@files
def test_new_tensors_say_where_they_are(path: Path) -> None:
    """Scripts set a default device, and Horovod's small numbers and compiled loops need host memory all the same."""
    silent = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and ast.unparse(node.func.value) == "torch"
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not silent


# From the top down: a room imports itself and the rooms after it, never one before it.
ROOMS = {
    "checkpoint": "files of a whole job, written and loaded by all ranks together",
    "optimizer": "what the user's object does",
    "engine": "gradients arrive, buckets are cut, collectives are ordered",
    "algorithms": "one paper a file",
    "exchange": "how payloads travel",
    "bucket": "parameters that travel together, and their flat buffers",
    "compressors": "what travels: mathematics on tensors, without network, optimizer or memory",
    "comm": "the only imports of Horovod and mpi4py",
    "finite": "infinities and nan",
    "digest": "a number that depends on every bit of a vector",
    "native": "compiled loops",
    "telemetry": "figures",
    "validation": "checks of user-given values",
}
# Compressors know nothing of the network.
FORBIDDEN = {"compressors": {"comm", "telemetry"}}
OUTSIDE = {"horovod": {"comm/communicator.py", "comm/handle.py"}, "mpi4py": {"comm/mpi_tree.py"}}


def room(name: str) -> str:
    """Return the room of a module's path or dotted name."""
    parts = name.removeprefix("hvd_compress").strip("./").replace("/", ".").removesuffix(".py").split(".")
    return parts[0]


@files
def test_imports_run_downwards(path: Path) -> None:
    here = room(str(path.relative_to(ROOT)))
    if here == "__init__":
        return
    order = list(ROOMS)
    allowed = {here, *order[order.index(here) :]} - FORBIDDEN.get(here, set())
    found = {room(name) for name in imports(path, "hvd_compress") if name != "hvd_compress"}
    assert found <= allowed, f"{path}: {sorted(found - allowed)}"


@files
@pytest.mark.parametrize("package", OUTSIDE)
def test_network_libraries_are_imported_in_one_room(path: Path, package: str) -> None:
    assert bool(imports(path, package)) == (str(path.relative_to(ROOT)) in OUTSIDE[package])


# Modules that execute what they read, and calls that may. comm/mpi_tree.py must not use mpi4py's lower-case methods.
EXECUTING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
EXECUTING_CALLS = {"torch.load", "torch.save", "numpy.load", "np.load", "eval", "exec"}
OBJECTS = {"broadcast_object", "allgather_object", "broadcast_object_fn", "broadcast_optimizer_state"}
PICKLING = {"send", "recv", "sendrecv", "isend", "irecv", "bcast", "gather", "allgather", "scatter", "alltoall"}
# File and call, with the reason why it is allowed.
ALLOWED_CALLS: dict[tuple[str, str], str] = {}


def called(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def executing(path: Path, forbidden: set[str]) -> set[str]:
    """Return the calls in a file that may execute what they read, by their last or by their whole name."""
    found = {call for call in called(path) if call in forbidden or call.rpartition(".")[2] in forbidden & OBJECTS}
    return found | {name for name in imported(path) if name.partition(".")[0] in EXECUTING}


@files
def test_nothing_from_ranks_or_files_is_executed(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    found = executing(path, EXECUTING_CALLS | OBJECTS)
    if where in OUTSIDE["mpi4py"]:
        found |= {call for call in called(path) if call.startswith("self._mpi.") and call[10:] in PICKLING}
    assert {call for call in found if (where, call) not in ALLOWED_CALLS} == set()


def test_exceptions_to_the_rule_are_needed() -> None:
    assert all(call in executing(ROOT / where, EXECUTING_CALLS | OBJECTS) for where, call in ALLOWED_CALLS)
    assert all(reason for reason in ALLOWED_CALLS.values())


def test_what_would_execute_is_found(tmp_path: Path) -> None:
    for text in ("import pickle", "from cloudpickle import loads", "torch.load(f)", "hvd.broadcast_object(v)"):
        (tmp_path / "file.py").write_text(text)
        assert executing(tmp_path / "file.py", EXECUTING_CALLS | OBJECTS), text


def test_every_room_is_named_and_exists() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ROOMS)


@files
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert (ast.get_docstring(ast.parse(text)) or "").strip()


def test_the_rules_have_something_to_rule() -> None:
    assert {"comm/communicator.py", "compressors/random_block.py", "algorithms/detached_ef.py"} <= set(NAMES)
    assert "hvd_compress.validation" in imported(ROOT / "compressors" / "sign.py")
