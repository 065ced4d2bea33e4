"""A job that saves, one that resumes in new processes, and one that is killed while it writes.

Arguments: what to do, and a directory. "train": 100 steps with each algorithm, saved after 50. "resume": load, take the
other 50 steps, and compare bits with the first job. "share": load on another number of ranks, and compare the model and
the pending update. "die": save once, then again, with the last rank killed halfway through its file.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Iterator

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_compress import DEF, EF, LIEC, CountSketch, Dense, DistEF, GlobalSketch, Identity, LowRank, TopK, checkpoint
from hvd_compress.checkpoint import PendingSave, files
from tests.multirank.support.algorithm_cases import BLOCK
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.networks import flat
from tests.multirank.support.training import harmonic_rate, make, shared_model, train, virtual_iterate
from tests.multirank.support.waiting import wait_without_spinning, yield_to_other_ranks

WHAT, WHERE = sys.argv[1], Path(sys.argv[2])
ALGORITHMS: dict[str, Any] = {
    "dense": Dense(),
    "exact": DEF(Identity()),
    "ef": EF(BLOCK),
    "topk": EF(TopK(0.25)),
    "low rank": EF(LowRank(1)),
    "def": DEF(BLOCK),
    "auto": DEF(BLOCK, "auto"),
    "local steps": DEF(TopK(0.25), 1.0, local_steps=4),  # 50 is no multiple
    "dist-ef": DistEF(),
    "liec": LIEC(averaging_period=3),
    "sketch": GlobalSketch(CountSketch(columns=8, rows=3)),
}


def points(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Return the shared model and the virtual iterate (collective)."""
    return {"x": shared_model(model, optimizer), "y": virtual_iterate(model, optimizer)}


def train_all() -> None:
    """Train with every algorithm, save in the middle, and note where each rank has got to."""
    for name, compression in ALGORITHMS.items():
        model, optimizer = make(compression)
        train(model, optimizer, 50, harmonic_rate)
        middle = points(model, optimizer)
        saved = checkpoint.save(WHERE / name, model, optimizer, extra={"done": 50}, step=50, asynchronous=name != "def")
        train(model, optimizer, 50, harmonic_rate, first=50)
        if isinstance(saved, PendingSave):
            saved.wait()
        torch.save({"end": flat(model), **middle}, WHERE / f"{name}.{hvd.rank()}.pt")


def resume_all() -> None:
    """Resume every algorithm and compare each rank's bits with those of the job that was not interrupted."""
    for name, compression in ALGORITHMS.items():
        noted = torch.load(WHERE / f"{name}.{hvd.rank()}.pt")
        model, optimizer = make(compression, seed=1)
        done = checkpoint.load(WHERE / name, model, optimizer)["done"]
        train(model, optimizer, 100 - done, harmonic_rate, first=done)
        assert torch.equal(flat(model), noted["end"]), f"{name} differs after resuming (rank {hvd.rank()})"


def share_all() -> None:
    """Resume on another number of ranks: neither the model nor the sum of what was pending may change."""
    for name, compression in ALGORITHMS.items():
        noted = torch.load(WHERE / f"{name}.0.pt")
        model, optimizer = make(compression, seed=1)
        assert checkpoint.load(WHERE / name, model, optimizer) == {"done": 50}
        found = points(model, optimizer)
        if name == "liec":  # its model is the mean of the ranks' own, which rounds
            close(found["x"], noted["x"], 1e-6, "shared model of liec")
        else:
            assert torch.equal(found["x"], noted["x"]), f"the shared model of {name}"
        close(found["y"], noted["y"], 1e-6, f"virtual iterate of {name}")
        train(model, optimizer, 10, harmonic_rate, first=50)
        same_everywhere(shared_model(model, optimizer), f"x of {name}, trained on {hvd.size()} ranks")


def die() -> None:
    """Save after ten steps, and be killed while the checkpoint of the eleventh is written."""
    model, optimizer = make(ALGORITHMS["def"])
    train(model, optimizer, 10, harmonic_rate)
    checkpoint.save(WHERE / "killed", model, optimizer, extra={"done": 10})
    train(model, optimizer, 1, harmonic_rate, first=10)
    chunks = files._chunks

    def half(*arguments: Any) -> Iterator[Any]:
        yield next(iter(chunks(*arguments)))
        os.kill(os.getpid(), signal.SIGKILL)

    if hvd.rank() == hvd.size() - 1:
        vars(files)["_chunks"] = half
    checkpoint.save(WHERE / "killed", model, optimizer, extra={"done": 11}, asynchronous=True)
    train(model, optimizer, 100000, harmonic_rate, first=11)


def revive() -> None:
    """Load what the killed job has left, and save again."""
    model, optimizer = make(ALGORITHMS["def"])
    assert checkpoint.load(WHERE / "killed", model, optimizer) == {"done": 10}
    train(model, optimizer, 1, harmonic_rate, first=10)
    path = checkpoint.save(WHERE / "killed", model, optimizer, keep=1)
    assert [found.name for found in (WHERE / "killed").iterdir()] == ["step-00000011"], path


wait_without_spinning()
hvd.init()
yield_to_other_ranks()
{"train": train_all, "resume": resume_all, "share": share_all, "die": die, "revive": revive}[WHAT]()
print("to the end", flush=True)
