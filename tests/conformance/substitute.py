"""A pytest plugin that replaces Horovod's DistributedOptimizer by ours, with an algorithm chosen from outside.

The environment variable ``HVD_COMPRESS_ALGORITHM`` is a key of ``ALGORITHMS``; without it Horovod's own class
is tested. The end of each test is noted as ranks of job files note their checks, for the harness to read.
"""

from __future__ import annotations

import json
import os
import sys
import unittest.mock
from typing import Any

import horovod.torch as hvd
import pytest
import torch

import hvd_compress
from hvd_compress import (
    DEF,
    EF,
    LIEC,
    CountSketch,
    Dense,
    DistEF,
    GlobalSketch,
    GlobalTopK,
    Identity,
    Policy,
    RandomBlock,
    TopK,
)

WHOLE_SKETCH = CountSketch(density=1.0, rows=1)
# Horovod's tests compare models right after a step, so all of these have no residual then.
ALGORITHMS: dict[str, Any] = {
    "dense": Dense(),
    "ef": EF(Identity()),
    "ef-topk": EF(TopK(1.0)),
    "def": DEF(Identity()),
    "def-block": DEF(RandomBlock(density=1.0), coefficient=0.3),
    "dist-ef": DistEF(Identity()),
    "liec": LIEC(Identity()),
    "sketch": GlobalSketch(WHOLE_SKETCH, masking=False),
    "sketch-masking": GlobalSketch(WHOLE_SKETCH, dense_vectors=False),
    "policy": Policy(DEF(Identity()), dense_dims=1),
    "sketch-tree": GlobalSketch(WHOLE_SKETCH, exchange="tree", masking=False),
    "global-topk": GlobalTopK(1.0),
}
# These exchange pairwise messages of MPI.
BY_MPI = ("sketch-tree", "global-topk")


def provide_mock() -> None:
    """Provide the package ``mock``, which became unittest.mock, for the helpers of Horovod's tests."""
    sys.modules.setdefault("mock", unittest.mock)


def pytest_configure(config: pytest.Config) -> None:
    provide_mock()
    # Horovod's tests try every optimizer of torch; this later one takes matrices only.
    if hasattr(torch.optim, "Muon"):
        torch.optim.Muon.__module__ = "taken.out"
    # Every test restarts Horovod, where a rank may connect to another's former address and abort.
    hvd.shutdown = lambda: None
    substitute()


def substitute() -> None:
    """Replace Horovod's class by ours, if an algorithm was named."""
    name = os.environ.get("HVD_COMPRESS_ALGORITHM")
    if name is None:
        return

    def distributed_optimizer(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 3:  # compression, Horovod's third argument, was left to its default
            kwargs.setdefault("compression", ALGORITHMS[name])
        return hvd_compress.DistributedOptimizer(*args, **kwargs)

    hvd.DistributedOptimizer = distributed_optimizer


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed and report.when != "call":
        return
    story = "ok" if report.passed else f"{report.outcome}: {report.longrepr}"
    with open(f"{os.environ['HVD_COMPRESS_NOTES']}/notes.{hvd.rank()}.jsonl", "a") as notes:
        notes.write(json.dumps([report.nodeid.rpartition("::")[2], story]) + "\n")
