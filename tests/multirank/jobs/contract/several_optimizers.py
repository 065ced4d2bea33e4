"""Several optimizers: one for each of two models, one after the other for the same model."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import horovod.torch as hvd

from tests.multirank.support.algorithm_cases import EXACT, LOSSY
from tests.multirank.support.assertions import same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import sgd, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


@cases(EXACT, LOSSY)
def check_one_optimizer_for_each_of_two_models(compression: Any) -> None:
    """requires_grad is switched between steps, as adversarial training does; names occur twice."""
    models = [network(), network(seed=1)]
    optimizers = [wrap(m, sgd(m), compression) for m in models]
    for t in range(4):
        active = t % 2
        for k, model in enumerate(models):
            for p in model.parameters():
                p.requires_grad_(k == active)
        optimizers[active].zero_grad()
        loss_of(models[active], hvd.rank(), t).backward()
        optimizers[active].step()
    for model, optimizer in zip(models, optimizers):
        with optimizer.consensus():
            same_everywhere(flat(model), "x")


@cases(EXACT, LOSSY)
def check_two_optimizers_at_once(compression: Any) -> None:
    """Both backward passes come before both steps, as in a GAN."""
    models = [network(seed=seed) for seed in (0, 1)]
    optimizers = [wrap(model, sgd(model), compression) for model in models]
    for t in range(4):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
        for optimizer in optimizers:
            optimizer.step()
    for model, optimizer in zip(models, optimizers):
        with optimizer.consensus():
            same_everywhere(flat(model), f"one of two models at once, {compression}")


@cases(EXACT, LOSSY)
def check_a_model_may_be_wrapped_again(compression: Any) -> None:
    """The former optimizer's hooks do nothing, even before a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        model = network()
        for _ in range(3):
            optimizer = wrap(model, sgd(model), compression)
            train(model, optimizer, 3, lambda t: 0.05)
            optimizer.state_dict()
    finally:
        gc.enable()


@cases(EXACT, LOSSY)
def check_a_dropped_optimizer_is_freed(compression: Any) -> None:
    """Its memory is freed and its hooks do nothing: another optimizer may train the model."""
    model = network()
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression)
    train(model, optimizer, 2, lambda t: 0.05)
    dropped = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert dropped() is None, f"{compression} is not freed"
    loss_of(model, hvd.rank(), 2).backward()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression)
    train(model, optimizer, 2, lambda t: 0.05)
    with optimizer.consensus():
        same_everywhere(flat(model), f"x after {compression} was dropped and built anew")
    parameter = weakref.ref(next(model.parameters()))
    del optimizer, model
    gc.collect()
    assert parameter() is None, f"parameters are not freed after {compression}"
