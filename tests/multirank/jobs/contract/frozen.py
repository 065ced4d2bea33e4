"""Frozen means frozen: a parameter without gradient that requires none keeps its value, whatever is pending for it."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import Dense
from tests.multirank.support.algorithm_cases import EXACT, LOSSY, LOSSY_WITH_OPTIONS, has_local_models
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import make, mean_gradient, shared_model, take_step, virtual_iterate, wrap

RANKS = (2,)
FULL_RANKS = (3, 4)
FIRST = 5 * 7 + 7  # elements of the first layer


@cases(
    compression=(EXACT, LOSSY_WITH_OPTIONS),
    momentum=more_in_full((0.9,), (0.0,)),
    weight_decay=more_in_full((0.1,), (0.0,)),
)
def check_a_frozen_layer_keeps_its_bits(compression: Any, momentum: float, weight_decay: float) -> None:
    model, optimizer = make(compression, lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for t in range(6):
        take_step(model, optimizer, t)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    before, own = shared_model(model, optimizer)[:FIRST], flat(model)[:FIRST]
    for t in range(6, 12):
        take_step(model, optimizer, t)
        if t == 8:
            optimizer.flush()
        assert torch.equal(flat(model)[:FIRST], own), f"the parameters themselves, step {t}"
    after = shared_model(model, optimizer)
    if not has_local_models(compression):
        assert torch.equal(after[:FIRST], before), "the shared model"
    assert not torch.equal(after[FIRST:], flat(make(compression)[0])[FIRST:]), "the other layer is trained"
    same_everywhere(after, f"x, {compression}")


@cases(compression=LOSSY, flushed=(False, True))
def check_what_is_pending_waits_until_the_layer_is_trained_again(compression: Any, flushed: bool) -> None:
    """Nothing is lost and nothing is added while a layer is frozen: the virtual iterate goes on from where it was."""
    model, optimizer = make(compression, torch.float64, lr=0.1, momentum=0.0)
    for t in range(6):
        take_step(model, optimizer, t)
    start = virtual_iterate(model, optimizer)
    model[0].requires_grad_(False)
    for t in range(6, 10):
        take_step(model, optimizer, t)
        if flushed and t == 7:
            optimizer.flush()
    model[0].requires_grad_(True)
    expected = start[:FIRST].clone()
    for t in range(10, 14):
        expected -= 0.1 * mean_gradient(model, t)[:FIRST]
        take_step(model, optimizer, t)
    close(virtual_iterate(model, optimizer)[:FIRST], expected, 1e-10, f"the virtual iterate, {compression}")


@cases(LOSSY)
def check_a_flush_by_adam_leaves_a_frozen_layer(compression: Any) -> None:
    """Where a flush is a step of the wrapped optimizer, a frozen layer has no part in it; what is pending waits."""
    model = network(torch.float64)
    optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.01), compression)
    for t in range(6):
        take_step(model, optimizer, t)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    before = flat(model)
    optimizer.flush()
    assert torch.equal(flat(model)[:FIRST], before[:FIRST])
    assert not torch.equal(flat(model)[FIRST:], before[FIRST:]), "the other layer is flushed"


@cases(Dense(), LOSSY)
def check_a_group_that_is_taken_out_keeps_its_bits(compression: Any) -> None:
    """Parameters that are in no group any more are not moved by what is pending for them either."""
    model, optimizer = make(compression, lr=0.1)
    groups = [{**optimizer.param_groups[0], "params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer.param_groups[:] = groups
    for t in range(5):
        take_step(model, optimizer, t)
    del optimizer.param_groups[0]
    before = flat(model)[:FIRST]
    for t in range(5, 9):
        take_step(model, optimizer, t)
    assert torch.equal(flat(model)[:FIRST], before)
    every = hvd.allgather(shared_model(model, optimizer).reshape(1, -1), name="test.x")
    assert has_local_models(compression) or torch.equal(every[0], every[-1])
