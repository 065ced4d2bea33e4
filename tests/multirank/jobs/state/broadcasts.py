"""States that only rank 0 has restored, and their broadcast."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, Dense, DistEF
from tests.multirank.support.algorithm_cases import BLOCK, BLOCKS, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.checkpoints import through_a_file
from tests.multirank.support.internals import residuals, set_step_count, step_count
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import harmonic_rate, make, sgd, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
# Not here: LBFGS (Horovod refuses to broadcast it), SparseAdam (sparse gradients only), Muon (matrices only).
NAMES = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
CLASSES = [getattr(torch.optim, name) for name in NAMES if hasattr(torch.optim, name)]


def build(cls: Any, model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """Return an optimizer with momentum and weight decay if its class knows them."""
    wanted = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    known = inspect.signature(cls.__init__).parameters
    optimizer: torch.optim.Optimizer = cls(model.parameters(), **{k: v for k, v in wanted.items() if k in known})
    return optimizer


def entries(optimizer: Any, model: nn.Module) -> torch.Tensor:
    """Return the optimizer's state of all parameters as one vector."""
    values = [torch.as_tensor(v) for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    return torch.cat([v.detach().double().reshape(-1) for v in values])


@cases(compression=(Dense(), LOSSY_WITH_OPTIONS), momentum=(0.9, 0.0))
def check_broadcast_of_optimizer_state(compression: Any, momentum: float) -> None:
    """Only rank 0 has restored a state: momenta are broadcast, residuals remain their ranks' own."""
    model, optimizer = make(compression, momentum=momentum)
    if hvd.rank() == 0:
        twin = network()
        plain = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=momentum)
        loss_of(twin, 0, 0).backward()
        plain.step()
        optimizer.load_state_dict(plain.state_dict())
        model.load_state_dict(twin.state_dict())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    if momentum:
        assert optimizer.param_groups[0]["lr"] == 0.02
        same_everywhere(optimizer.state[model[0].weight]["momentum_buffer"].flatten(), "momentum")
    train(model, optimizer, 5, harmonic_rate)
    with optimizer.consensus():
        same_everywhere(flat(model), f"x with {compression}")
    if compression == Dense():
        return
    before = residuals(optimizer)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert torch.equal(residuals(optimizer), before), "a broadcast must not change residuals"


@cases(Dense(), LOSSY_WITH_OPTIONS)
def check_a_state_loaded_on_one_rank_is_broadcast(compression: Any) -> None:
    """By Horovod's recipe rank 0 restores a checkpoint; loading must not wait for the other ranks."""
    model, optimizer = make(compression)
    train(model, optimizer, 4, harmonic_rate)
    with optimizer.consensus():
        weights = through_a_file(model.state_dict())
        wanted = flat(model)
    state = through_a_file(optimizer.state_dict())
    again, resumed = make(compression, seed=1)
    if hvd.rank() == 0:
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
    hvd.broadcast_parameters(again.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(resumed, root_rank=0)
    with resumed.consensus():
        # Not equal: rank 0's own point is broadcast.
        close(flat(again), wanted, 0.2, f"x of the checkpoint, {compression}")
        same_everywhere(flat(again), f"x after the broadcast, {compression}")
    train(again, resumed, 4, harmonic_rate, first=4)
    with resumed.consensus():
        same_everywhere(flat(again), f"x after resuming, {compression}")


@cases(cls=CLASSES, compression=(Dense(), *BLOCKS))
def check_state_of_every_class_is_broadcast(cls: Any, compression: Any) -> None:
    """Only rank 0 has restored a state and other options; a new optimizer's state is made without a step of ours."""
    model = network(seed=hvd.rank())
    optimizer = wrap(model, build(cls, model, lr=0.01 * (1 + hvd.rank())), compression)
    if hvd.rank() == 0:
        twin = network(seed=5)
        plain = build(cls, twin)
        for t in range(2):
            plain.zero_grad()
            loss_of(twin, 0, t).backward()
            plain.step()
        model.load_state_dict(twin.state_dict())
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    # To make a state, Horovod takes a step with zero gradients, which would decay the weights.
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    broadcast = flat(model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    what = f"{cls.__name__}, {compression}"
    assert torch.equal(flat(model), broadcast), f"parameters moved, {what}"
    same_everywhere(flat(model), f"parameters, {what}")
    same_everywhere(entries(optimizer, model), f"state, {what}")
    assert optimizer.param_groups[0]["lr"] == 0.01
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
    with optimizer.consensus():
        same_everywhere(flat(model), f"x, {what}")
        assert torch.isfinite(flat(model)).all()


@cases(Dense(), *BLOCKS)
def check_step_count_is_right_after_a_broadcast(compression: Any) -> None:
    """A checkpoint, or an elastic commit, may be taken before the next step."""
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
    if hvd.rank() == 0:
        state = optimizer.state_dict()
        set_step_count(state, 7)
        optimizer.load_state_dict(state)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    counts = [step_count(optimizer)]
    train(model, optimizer, 1, lambda t: 0.1)
    counts.append(step_count(optimizer))
    assert counts == [7, 8], f"{counts} with {compression}"


@several_ranks
@cases(DEF(BLOCK), DistEF(BLOCK))
def check_ranks_that_start_with_other_parameters_are_warned(compression: Any) -> None:
    model = network(seed=hvd.rank())
    optimizer = wrap(model, sgd(model), compression)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 1, lambda t: 0.1)
    assert any("broadcast_parameters" in str(w.message) for w in caught), compression
