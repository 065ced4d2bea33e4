"""A state says everything: loaded into an optimizer that has been used it gives the training of a new one."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hvd_compress import DEF, Dense
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, LOSSY_WITH_OPTIONS, has_local_models
from tests.multirank.support.assertions import same_everywhere
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import make, shared_model, train

RANKS = (3,)  # where the sum of equal numbers, divided by their count, may be another number
FULL_RANKS = (1, 2)


def saved(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Return copies of the states of model and optimizer, at the shared model."""
    with optimizer.consensus():
        return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def load(model: Any, optimizer: Any, weights: Any, state: Any) -> None:
    """Load copies of both."""
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))


@cases(EXACT, LOSSY_WITH_OPTIONS)
def check_a_state_from_before_the_first_step(compression: Any) -> None:
    """A range test at ten times the rate, and back to the beginning: nothing of it is left."""
    model, optimizer = make(compression)
    train(model, optimizer, 6, lambda t: 0.05, first=20)
    expected = shared_model(model, optimizer)
    model, optimizer = make(compression)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6, lambda t: 0.5)
    load(model, optimizer, weights, state)
    train(model, optimizer, 6, lambda t: 0.05, first=20)
    assert torch.equal(shared_model(model, optimizer), expected)


@cases(compression=(Dense(), LOSSY), saved_by=("itself, a layer frozen", "Dense"))
def check_what_a_state_does_not_hold_is_not_kept(compression: Any, saved_by: str) -> None:
    dense = saved_by == "Dense"
    model, optimizer = make(Dense() if dense else compression, momentum=0.0)
    model[0].requires_grad_(dense)
    train(model, optimizer, 4, lambda t: 0.1)
    weights, state = saved(model, optimizer)
    ends = []
    for used in (True, False):
        model, optimizer = make(compression, seed=3, momentum=0.0)
        if used:
            train(model, optimizer, 5, lambda t: 0.1, first=10)
        load(model, optimizer, weights, state)
        train(model, optimizer, 4, lambda t: 0.1, first=20)
        ends.append(shared_model(model, optimizer))
    assert torch.equal(*ends), f"{compression}"


@cases(compression=(EXACT, LOSSY_WITH_OPTIONS), momentum=more_in_full((0.9,), (0.0,)))
def check_the_optimizer_alone_goes_back(compression: Any, momentum: float) -> None:
    """The model is kept, momentum and residuals are forgotten, and replicas stay equal."""
    model, optimizer = make(compression, momentum=momentum)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 8, lambda t: 0.05)
    before = shared_model(model, optimizer)
    optimizer.load_state_dict(state)
    assert torch.equal(shared_model(model, optimizer), before), "the shared model moved"
    train(model, optimizer, 6, lambda t: 0.05, first=8)
    same_everywhere(shared_model(model, optimizer), f"x, {compression}")


@cases(compression=(LOSSY,), dtype=more_in_full((torch.float64,), (torch.float32,)))
def check_the_model_alone_goes_back(compression: Any, dtype: torch.dtype) -> None:
    """Weights that were saved earlier are the model; what is pending joins it."""
    model, optimizer = make(compression, dtype)
    train(model, optimizer, 3, lambda t: 0.05)
    weights, _ = saved(model, optimizer)
    x = shared_model(model, optimizer)
    train(model, optimizer, 5, lambda t: 0.05, first=3)
    model.load_state_dict(weights)
    if not has_local_models(compression):
        assert torch.equal(shared_model(model, optimizer), x)
    train(model, optimizer, 3, lambda t: 0.05, first=8)
    same_everywhere(shared_model(model, optimizer), f"x, {compression}")
    model.load_state_dict(weights)
    optimizer.adopt_parameters()
    assert torch.equal(flat(model), x), "the mean of equal parameters"


@cases(Dense(), LOSSY)
def check_loading_twice_is_loading_once(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 5, lambda t: 0.05)
    weights, state = saved(model, optimizer)
    ends = []
    for times in (1, 2):
        again, resumed = make(compression, seed=5)
        for _ in range(times):
            load(again, resumed, weights, state)
        train(again, resumed, 4, lambda t: 0.05, first=5)
        ends.append(flat(again))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], flat(network()))


@cases(LOSSY_WITH_OPTIONS, DEF(BLOCK, local_steps=5))
def check_both_go_back_while_a_layer_is_frozen(compression: Any) -> None:
    """The frozen layer is where it was all the time, the other one is not: the state is restored for both."""
    model, optimizer = make(compression)
    train(model, optimizer, 4, lambda t: 0.05)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    train(model, optimizer, 2, lambda t: 0.05, first=4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, lambda t: 0.05, first=6)
    expected = shared_model(model, optimizer), flat(model)
    load(model, optimizer, weights, state)
    train(model, optimizer, 3, lambda t: 0.05, first=6)
    assert torch.equal(shared_model(model, optimizer), expected[0]), f"x, {compression}"
    assert torch.equal(flat(model), expected[1]), f"this rank's own point, {compression}"
