"""Checkpoints: written to a file and read, and runs that resume from them."""

from __future__ import annotations

import io
from typing import Any, Callable

import torch

from tests.multirank.support.assertions import same_everywhere
from tests.multirank.support.internals import residuals
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


# Saved inside of consensus(): model and optimizer, only the model, or nothing.
POINTS = ("consensus", "model at consensus", "own")
