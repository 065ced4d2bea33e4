"""A step is a transaction: gradients that are thrown away, for whatever reason, have never been."""

from __future__ import annotations

import math
from typing import Any, Callable

import horovod.torch as hvd
import torch

from hvd_compress import Dense
from tests.multirank.support.algorithm_cases import EXACT, LOSSY, LOSSY_WITH_OPTIONS, exchanges_updates
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.internals import residuals, step_count
from tests.multirank.support.networks import flat, loss_of
from tests.multirank.support.training import harmonic_rate, make, take_step, train

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


def backward(model: Any, t: int, factor: float = 1.0) -> None:
    """Compute this rank's gradients, times a factor."""
    (factor * loss_of(model, hvd.rank(), t)).backward()


def by_zero_grad(model: Any, optimizer: Any) -> None:
    """Synchronize, look at the gradients, and zero them."""
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.synchronize()
    optimizer.zero_grad()


def by_zero_grad_in_place(model: Any, optimizer: Any) -> None:
    """The same, but keep the tensors."""
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.synchronize()
    optimizer.zero_grad(set_to_none=False)


def by_setting_none(model: Any, optimizer: Any) -> None:
    """Synchronize, and take the gradients off the parameters by hand."""
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.synchronize()
    for p in model.parameters():
        p.grad = None


def by_loading_a_state(model: Any, optimizer: Any) -> None:
    """Synchronize, and load the state from before."""
    state = optimizer.state_dict()
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.synchronize()
    optimizer.load_state_dict(state)


def by_passes(model: Any, optimizer: Any) -> None:
    """Synchronize, and begin to count passes anew."""
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.synchronize()
    optimizer.set_backward_passes_per_step(1)
    optimizer.zero_grad()


def without_synchronize(model: Any, optimizer: Any) -> None:
    """Give the step up in the middle of backward's results."""
    optimizer.zero_grad()
    backward(model, 50, 1000.0)
    optimizer.set_backward_passes_per_step(1)
    optimizer.zero_grad()


WAYS = more_in_full(
    (by_zero_grad, by_loading_a_state, without_synchronize), (by_zero_grad_in_place, by_setting_none, by_passes)
)


@cases(compression=(Dense(), LOSSY_WITH_OPTIONS), give_up=WAYS)
def check_a_step_that_is_given_up_leaves_everything_as_it_was(
    compression: Any, give_up: Callable[[Any, Any], None]
) -> None:
    """Training that gives up a step, now and then, has the bits of training that has not begun it."""
    results = []
    for gives_up in (False, True):
        model, optimizer = make(compression)
        for t in range(9):
            if gives_up and t % 3 == 1:
                before, count = flat(model), step_count(optimizer)
                give_up(model, optimizer)
                assert torch.equal(flat(model), before)
                assert step_count(optimizer) == count, "no step was counted"
            for group in optimizer.param_groups:
                group["lr"] = harmonic_rate(t)
            take_step(model, optimizer, t)
        with optimizer.consensus():
            results.append((flat(model), torch.zeros(1) if compression == Dense() else residuals(optimizer)))
    assert all(torch.equal(a, b) for a, b in zip(*results)), f"{compression}"


@cases(EXACT, LOSSY)
def check_two_networks_whose_losses_reach_both(compression: Any) -> None:
    """Each loss has gradients for both networks, of which one half is synchronized and thrown away (GANs)."""
    results = []
    for both in (False, True):
        (one, for_one), (two, for_two) = make(compression, seed=0), make(compression, seed=1)
        for t in range(6):
            for own, other, optimizer, others in ((one, two, for_one, for_two), (two, one, for_two, for_one)):
                optimizer.zero_grad()
                loss = loss_of(own, hvd.rank(), t)
                if both:
                    loss = loss + 100.0 * loss_of(other, hvd.rank(), t + 20)
                loss.backward()
                optimizer.step()
                if both:
                    others.synchronize()
                    others.zero_grad()
        results.append([flat(one), flat(two)])
    assert all(torch.equal(a, b) for a, b in zip(*results)), f"{compression}"


@cases(Dense(), LOSSY)
def check_synchronize_without_new_gradients_does_nothing(compression: Any) -> None:
    results = []
    for times in (1, 3):
        model, optimizer = make(compression)
        for t in range(5):
            optimizer.zero_grad()
            backward(model, t)
            for _ in range(times):
                optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        assert step_count(optimizer) == 5
        results.append(flat(model))
    assert torch.equal(*results), f"{compression}"


@cases(compression=LOSSY, factor=(1.0, math.nan))
def check_gradients_added_to_what_was_synchronized_count(compression: Any, factor: float) -> None:
    """Backward after synchronize() adds to its results, if they are still there: both are used.

    Also where a rank had a nan: others are told of it by a second write into their results.
    """
    model, optimizer = make(compression, lr=0.1, momentum=0.0)
    train(model, optimizer, 3, lambda t: 0.1)
    optimizer.zero_grad()
    backward(model, 3, factor if hvd.rank() == 0 else 1.0)
    optimizer.synchronize()
    backward(model, 4)
    optimizer.step()
    expected = 4 if exchanges_updates(compression) else 5
    assert step_count(optimizer) == expected
    take_step(model, optimizer, 5)
