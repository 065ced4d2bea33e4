"""docs/architecture.md is right about the life of a step: its lists are the order of calls on real ranks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import horovod.torch as hvd
import torch

import hvd_compress
from hvd_compress import DEF, EF, DistEF, RandomBlock
from tests.multirank.support.cases import cases

RANKS = (2,)
PAGE = Path(__file__).resolve().parents[4] / "docs" / "architecture.md"
STEPS = {
    "EF": EF(RandomBlock(density=0.5)),
    "DEF": DEF(RandomBlock(density=0.5)),
    "DistEF": DistEF(),
}


def listed(algorithm: str) -> list[str]:
    """Return the names that the page lists for a step of this algorithm, in its order."""
    section = re.search(rf"^### {algorithm}: .*?(?=^##)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert section, f"{PAGE.name} has no section for {algorithm}"
    return re.findall(r"^\d+\. `([\w.]+)`", section.group(), re.MULTILINE)


def names_of_code() -> dict[CodeType, str]:
    """Return ``Class.method`` of every method of the package, and the name of every function."""
    found: dict[CodeType, str] = {}
    for info in pkgutil.walk_packages(hvd_compress.__path__, "hvd_compress."):
        if "._" in info.name:  # compiled loops
            continue
        module = importlib.import_module(info.name)
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for owner in (module, *classes):
            prefix = f"{owner.__name__}." if inspect.isclass(owner) else ""
            for value in vars(owner).values():
                function = inspect.unwrap(value) if inspect.isfunction(value) else value
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    found[function.__code__] = prefix + function.__name__
    return found


def calls_of_a_step(algorithm: Any, wanted: set[str]) -> list[str]:
    """Return the calls of ``wanted`` functions in the third step of a model of one parameter, in their order."""
    names = names_of_code()
    assert wanted <= set(names.values()), f"the package has no {sorted(wanted - set(names.values()))}"
    model = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.constant_(model.weight, 0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hvd_compress.DistributedOptimizer(sgd, model.named_parameters(), compression=algorithm)
    calls: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (name := names.get(frame.f_code)) in wanted:
            calls.append(name)

    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.full((2, 4), 1.0 + hvd.rank())).square().sum()
        if step == 2:
            sys.setprofile(note)
        loss.backward()
        optimizer.step()
        sys.setprofile(None)
    return calls


@cases(*STEPS)
def check_the_order_of_calls_is_the_pages(name: str) -> None:
    expected = listed(name)
    assert len(expected) > 10, f"{PAGE.name} lists too little of {name}"
    with torch.device("cpu"):  # there hooks run on this thread, and are seen
        calls = calls_of_a_step(STEPS[name], set(expected))
    assert calls == expected, "\n".join([f"{name}: the page, then the calls", *expected, "--", *calls])
