"""Jobs, and the cases of their checks: pytest, which collects cases, and the ranks, which run them, name them alike.

A check is a function ``check_*`` of a job file. ``@cases`` gives it cases, ``@only`` restricts the jobs that it is part
of::

    @several_ranks
    @cases(compression=(EXACT, DEF(TopK(0.1))), flushed=(False, True))
    def check_something(compression, flushed): ...

Which cases there are may depend on the job (``PerJob``), but not on Horovod, so that pytest need not start it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import os
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping, TypeVar, Union

import torch

FULL = os.environ.get("HVD_COMPRESS_FULL") == "1"
PACKAGE = "tests.multirank.jobs"
Check = TypeVar("Check", bound=Callable[..., None])


@dataclass(frozen=True)
class Job:
    """A job file at a number of ranks.

    Attributes:
        file: path of the file below ``jobs/`` without its suffix, such as "contract/stepping".
        ranks: number of ranks.
        launcher: "gloo" or "mpi".
        full: True if the job runs all cases, False if it runs the quick ones.
    """

    file: str
    ranks: int
    launcher: str
    full: bool

    @property
    def folder(self) -> str:
        """Return the folder of the job file below ``jobs/``."""
        return self.file.partition("/")[0]

    @property
    def mpi(self) -> bool:
        """Return True if mpirun has started the job."""
        return self.launcher == "mpi"

    @property
    def makes_process_sets(self) -> bool:
        """Return True if the job file makes process sets."""
        return getattr(self.module(), "PROCESS_SETS", False)

    def module(self) -> Any:
        """Import the job file."""
        return importlib.import_module(f"{PACKAGE}.{self.file.replace('/', '.')}")


@dataclass(frozen=True)
class PerJob:
    """Values that depend on the job."""

    choose: Callable[[Job], Iterable[Any]]


Source = Union[PerJob, Mapping[str, Any], Iterable[Any]]


def cases(*values: Any, where: Callable[..., bool] = lambda *a, **k: True, **axes: Source) -> Callable[[Check], Check]:
    """Run a check once per case.

    Args:
        values: the values of the check's only argument; a ``PerJob`` among them adds its values, a mapping its values
            under the names of its keys.
        where: leave out the cases for which this is false; it takes the arguments of the check.
        axes: instead of ``values``, sources of the values of each argument by keyword. Cases are all combinations.

    Raises:
        ValueError: if both values and axes are given.
    """
    if values and axes:
        raise ValueError("cases: give values or axes, not both")

    def decorate(check: Check) -> Check:
        check.__dict__["cases"] = (values, axes, where)
        return check

    return decorate


def only(condition: Callable[[Job], bool]) -> Callable[[Check], Check]:
    """Make a check part of those jobs only for which ``condition`` is true."""

    def decorate(check: Check) -> Check:
        check.__dict__.setdefault("conditions", []).append(condition)
        return check

    return decorate


def requires(present: bool) -> Callable[[Check], Check]:
    """Make a check part of no job where ``present`` is false: something it needs is not in this version of torch."""

    def decorate(check: Check) -> Check:
        check.__dict__["missing"] = not present
        return check

    return decorate


several_ranks = only(lambda job: job.ranks > 1)
by_mpi = only(lambda job: job.mpi)
without_mpi = only(lambda job: not job.mpi)
SCALES_ON_CPU = hasattr(torch.amp, "GradScaler")  # torch >= 2.3
scales_on_cpu = requires(SCALES_ON_CPU)


def name_of(value: Any) -> str:
    """Return a readable name: of an algorithm or compressor its call without default arguments."""
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(name_of, value))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = []
        for k, field in enumerate(dataclasses.fields(value)):
            content = getattr(value, field.name)
            if field.init and content != field.default:
                parts.append(name_of(content) if k == 0 else f"{field.name}={name_of(content)}")
        return f"{type(value).__name__}({', '.join(parts)})"
    return getattr(value, "__name__", None) or repr(value).replace("torch.", "")


def more_in_full(quick: Iterable[Any], more: Iterable[Any]) -> PerJob:
    """Return the values ``quick``, and in jobs of the full run also ``more``."""
    return PerJob(lambda job: (*quick, *more) if job.full else quick)


def calls(module: Any, job: Job) -> dict[str, Callable[[], None]]:
    """Return every check of a job with each of its cases, ready to be called, by "check" or "check[case]", in order.

    A check whose cases are gone stays as "check[]", which fails.
    """
    found: dict[str, Callable[[], None]] = {}
    for name, check in checks(module).items():
        if is_missing(check) or not all(condition(job) for condition in check.__dict__.get("conditions", ())):
            continue
        if "cases" not in check.__dict__:
            found[name] = check
            continue
        named = _cases_of(check, job)
        found.update({f"{name}[{case}]": call for case, call in named.items()})
        if not named:
            found[f"{name}[]"] = functools.partial(_fail, f"{name} has no case in {job}")
    return found


def checks(module: Any) -> dict[str, Callable[..., None]]:
    """Return the checks of a job file by name, in the file's order."""
    return {name: f for name, f in vars(module).items() if name.startswith("check_") and inspect.isfunction(f)}


def is_missing(check: Callable[..., None]) -> bool:
    """Return True if this version of torch lacks what the check requires."""
    return bool(check.__dict__.get("missing", False))


def _cases_of(check: Callable[..., None], job: Job) -> dict[str, Callable[[], None]]:
    """Return the calls of one check by the names of their cases."""
    values, axes, where = check.__dict__["cases"]
    if not axes:
        return {name: functools.partial(check, v) for name, v in _expand(values, job).items() if where(v)}
    named = [[(key, *item) for item in _expand(source, job).items()] for key, source in axes.items()]
    found: dict[str, Callable[[], None]] = {}
    for combination in itertools.product(*named):
        arguments = {key: value for key, _, value in combination}
        if where(**arguments):
            name = ", ".join(_described(*item) for item in combination)
            found[name] = functools.partial(check, **arguments)
    return found


def _described(key: str, name: str, value: Any) -> str:
    """Return the name of a value, after the argument's where the value alone would not tell: flushed=True."""
    return f"{key}={name}" if value is None or isinstance(value, (bool, int, float)) else name


def _expand(source: Source, job: Job) -> dict[str, Any]:
    """Return the values of a source by name; equal ones that occur twice become one."""
    if isinstance(source, PerJob):
        return _expand(source.choose(job), job)
    if isinstance(source, Mapping):
        return dict(source)
    found: dict[str, Any] = {}
    for item in source:
        named = _expand(item, job) if isinstance(item, (PerJob, Mapping)) else {name_of(item): item}
        for name, value in named.items():
            known = found.setdefault(name, value)
            if known is not value and known != value:
                raise ValueError(f"two cases are named {name}: {known!r} and {value!r}")
    return found


def _fail(message: str) -> None:
    raise AssertionError(message)
