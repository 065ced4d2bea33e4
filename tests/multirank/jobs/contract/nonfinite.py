"""Infinities and nan in one rank's gradients: seen, refused or left out on all ranks, and never kept in a residual."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, Dense, Policy
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, LOSSY_WITH_OPTIONS, exchanges_updates
from tests.multirank.support.assertions import raises, same_everywhere
from tests.multirank.support.cases import cases, more_in_full, several_ranks
from tests.multirank.support.internals import residuals, step_count
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import harmonic_rate, make, sgd, take_step, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
NUMBERS = (math.nan, math.inf, -math.inf)
NAME = "0.weight"


def backward(model: Any, t: int, value: float = math.nan) -> torch.Tensor:
    """Compute gradients; the last rank's of one element of a parameter is a number that is none."""
    loss = loss_of(model, hvd.rank(), t)
    if hvd.rank() == hvd.size() - 1:
        loss = loss + model.get_parameter(NAME)[2, 3] * value
    loss.backward()
    return loss


def with_policy(compression: Any, policy: str) -> Any:
    """Return the algorithm with another ``nonfinite``."""
    return dataclasses.replace(compression, nonfinite=policy)


def spoiled_step(model: Any, optimizer: Any, value: float = math.nan) -> None:
    """Take a step with a spoiled gradient."""
    optimizer.zero_grad()
    backward(model, 99, value)
    optimizer.step()


@cases(compression=(EXACT, LOSSY_WITH_OPTIONS), value=more_in_full(NUMBERS[:1], NUMBERS[1:]))
def check_it_is_seen_on_every_rank_and_kept_in_no_residual(compression: Any, value: float) -> None:
    """By default as with Horovod: in p.grad after synchronize() or in the model, of that parameter on all ranks."""
    model, optimizer = make(compression)
    train(model, optimizer, 4, harmonic_rate)
    optimizer.zero_grad()
    backward(model, 4, value)
    optimizer.synchronize()
    if not exchanges_updates(compression):
        assert not bool(torch.isfinite(model.get_parameter(NAME).grad).all()), "seen in p.grad"
        assert bool(torch.isfinite(model.get_parameter("2.bias").grad).all()), "and nowhere else"
    with optimizer.skip_synchronize():
        optimizer.step()
    assert not bool(torch.isfinite(model.get_parameter(NAME)).all()), "seen in the model"
    assert math.isfinite(optimizer.stats().residual_norm)
    assert compression == Dense() or bool(torch.isfinite(residuals(optimizer)).all())


@cases(compression=(Dense(), LOSSY), repaired=("model", "gradient"))
def check_training_goes_on_after_a_repair(compression: Any, repaired: str) -> None:
    """Weights and momenta loaded again, or the gradient cleaned before the step: nothing comes back later."""
    model, optimizer = make(compression)
    train(model, optimizer, 4, harmonic_rate)
    with optimizer.consensus():
        good = {name: value.clone() for name, value in model.state_dict().items()}
    momenta = sgd(network(), lr=0.05, momentum=0.9).state_dict()
    if repaired == "gradient" and not exchanges_updates(compression):
        optimizer.zero_grad()
        backward(model, 4)
        optimizer.synchronize()
        for p in model.parameters():
            p.grad.nan_to_num_(0.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    else:
        spoiled_step(model, optimizer)
        model.load_state_dict(good)
        optimizer.load_state_dict(momenta)
    train(model, optimizer, 20, harmonic_rate, first=5)
    with optimizer.consensus():
        assert bool(torch.isfinite(flat(model)).all())
        same_everywhere(flat(model), f"x, {compression}")


@cases(
    compression=(Dense(), LOSSY, Policy(EF(BLOCK), dense_dims=1), DEF(BLOCK, local_steps=2)),
    value=more_in_full(NUMBERS[1:2], NUMBERS[:1]),
)
def check_raise_names_parameter_and_rank_and_loses_nothing(compression: Any, value: float) -> None:
    """After the error everything is as before the step, and training goes on as if it had not been tried."""
    results = []
    for spoiled in (False, True):
        model, optimizer = make(with_policy(compression, "raise"))
        train(model, optimizer, 5, harmonic_rate)
        if spoiled:
            before, count = flat(model), step_count(optimizer)
            place = f"parameter {NAME!r} on rank {hvd.size() - 1}"
            call = partial(spoiled_step, model, optimizer, value)
            raises(FloatingPointError, place, f"this is rank {hvd.rank()}", "nonfinite='skip'", call=call)
            assert torch.equal(flat(model), before)
            assert step_count(optimizer) == count
            optimizer.zero_grad()
        train(model, optimizer, 4, harmonic_rate, first=5)
        results.append((flat(model), residuals(optimizer)) if compression != Dense() else (flat(model),))
    assert all(torch.equal(a, b) for a, b in zip(*results)), f"{compression}"


@cases(compression=(Dense(), LOSSY, DEF(BLOCK, local_steps=2)), explicit=(False, True))
def check_skip_leaves_the_step_out_on_all_ranks(compression: Any, explicit: bool) -> None:
    results = []
    for spoiled in (False, True):
        model, optimizer = make(with_policy(compression, "skip"))
        train(model, optimizer, 5, harmonic_rate)
        if spoiled:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    optimizer.zero_grad()
                    backward(model, 99)
                    if explicit:
                        optimizer.synchronize()
                        with optimizer.skip_synchronize():
                            optimizer.step()
                    else:
                        optimizer.step()
            told = [str(w.message) for w in caught if "left out on all ranks" in str(w.message)]
            assert len(told) == 1 and NAME in told[0], "once, with the name"
            assert optimizer.stats().skipped_steps == 2
        train(model, optimizer, 4, harmonic_rate, first=5)
        results.append((flat(model), residuals(optimizer)) if compression != Dense() else (flat(model),))
    assert all(torch.equal(a, b) for a, b in zip(*results)), f"{compression}"


@cases(EF(BLOCK), DEF(BLOCK), Dense())
def check_skip_works_beside_a_gradient_that_is_missing(compression: Any) -> None:
    model, optimizer = make(with_policy(compression, "skip"))
    model.get_parameter("2.bias").requires_grad_(False)
    take_step(model, optimizer, 0)
    before = flat(model)
    spoiled_step(model, optimizer)
    assert torch.equal(flat(model), before)


@cases(EF(BLOCK), DEF(BLOCK), Dense())
def check_closures_raise(compression: Any) -> None:
    """Inside of a closure a step cannot be left out: then "skip" raises too."""
    model = network()
    optimizer = wrap(model, sgd(model, momentum=0.9), with_policy(compression, "skip"))

    def closure() -> Any:
        optimizer.zero_grad()
        return backward(model, 0)

    raises(FloatingPointError, NAME, call=lambda: optimizer.step(closure))


@several_ranks
def check_ranks_that_disagree_are_told() -> None:
    model = network()
    policy = "skip" if hvd.rank() == 1 else "raise"
    raises(ValueError, "ranks disagree", "nonfinite", call=lambda: wrap(model, sgd(model), EF(BLOCK, nonfinite=policy)))
