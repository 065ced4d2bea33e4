"""Checkpoints: written to files and read, runs that resume from them, and what a refusal must leave unchanged."""

from __future__ import annotations

import io
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import horovod.torch as hvd
import torch
from torch import nn

from tests.multirank.support.assertions import same_everywhere
from tests.multirank.support.internals import residuals, step_count
from tests.multirank.support.networks import flat
from tests.multirank.support.training import train


def through_a_file(value: Any) -> Any:
    """Return ``value`` saved and loaded."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def resumes_exactly(
    make: Callable[[int], tuple[Any, Any]], steps: int, more: int, schedule: Callable[[int], float], point: str
) -> None:
    """Fail unless a run that is saved after ``steps`` steps and resumed has the bits of an uninterrupted one.

    Args:
        make: return a model and its optimizer, from a seed for the parameters.
        more: number of steps after resuming.
        point: a key of ``POINTS``.
    """
    model, optimizer = make(0)
    train(model, optimizer, steps, schedule)
    if point == "own":
        weights = through_a_file(model.state_dict())
    else:
        with optimizer.consensus():
            weights = through_a_file(model.state_dict())
            state = through_a_file(optimizer.state_dict())
    if point != "consensus":
        state = through_a_file(optimizer.state_dict())
    train(model, optimizer, more, schedule, first=steps)
    again, resumed = make(1)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, more, schedule, first=steps)
    assert torch.equal(flat(again), flat(model)), "parameters"
    assert torch.equal(residuals(resumed), residuals(optimizer)), "residuals"
    with resumed.consensus():
        same_everywhere(flat(again), "x after resuming")


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Give a directory that all ranks share, and remove it afterwards (collective)."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(hvd.broadcast_object(own, name="test.directory"))
        hvd.barrier()


def last_rank() -> int:
    return int(hvd.size()) - 1


def unchanged(model: nn.Module, optimizer: Any, call: Callable[[], Any]) -> None:
    """Run ``call`` and fail if a parameter, residual, count or rate has changed."""
    before = flat(model), residuals(optimizer), step_count(optimizer), optimizer.param_groups[0]["lr"]
    call()
    assert torch.equal(flat(model), before[0])
    assert torch.equal(residuals(optimizer), before[1])
    assert (step_count(optimizer), optimizer.param_groups[0]["lr"]) == before[2:]


# Saved inside of consensus(): model and optimizer, only the model, or nothing.
POINTS = ("consensus", "model at consensus", "own")
