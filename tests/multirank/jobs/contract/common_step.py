"""The step number is common to all ranks before anything is drawn or launched by it; hooks never wait for them."""

from __future__ import annotations

import copy
import time
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, CountSketch, Dense, GlobalSketch, RandomK
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, has_local_models
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.internals import step_count
from tests.multirank.support.networks import flat, loss_of
from tests.multirank.support.training import make, shared_model, take_step, train, wrap

RANKS = (2,)
FULL_RANKS = (3, 4)
MPI_RANKS = (2,)
ALLREDUCES = (Dense(), EF(BLOCK), EF(RandomK(0.25)), DEF(BLOCK), GlobalSketch(CountSketch(columns=8, rows=3)))


@several_ranks
@cases(compression=ALLREDUCES, with_state=(False, True))
def check_an_uneven_number_of_steps_in_every_epoch(compression: Any, with_state: bool) -> None:
    """Rank 0 has a batch more than the others, in each of three epochs that end with hvd.join() and a broadcast."""
    slope = torch.linspace(0.5, 1.5, 64)
    w = nn.Parameter(torch.zeros(64))
    model = nn.ParameterList([w])
    optimizer = wrap(model, torch.optim.SGD([w], lr=0.1), compression)
    for _ in range(3):
        for _ in range(5 if hvd.rank() == 0 else 4):
            optimizer.zero_grad()
            (w * slope).sum().backward()
            optimizer.step()
        last = hvd.join()
        with optimizer.consensus():
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        hvd.broadcast_parameters(weights, root_rank=last)
        model.load_state_dict(weights)
        if with_state:
            hvd.broadcast_optimizer_state(optimizer, root_rank=last)
    optimizer.zero_grad()
    optimizer.flush()
    close(w.detach(), -0.1 * 3 * (4 + 1 / hvd.size()) * slope, 0.02, "distance moved")
    same_everywhere(w.detach(), "the model")


@several_ranks
@cases(EXACT, LOSSY)
def check_rank_zero_goes_back_and_all_follow(compression: Any) -> None:
    """Rank 0 loads an earlier model and state, and broadcasts both: Horovod's recipe, in the middle of training."""
    model, optimizer = make(compression)
    train(model, optimizer, 3, lambda t: 0.05)
    with optimizer.consensus():
        weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5, lambda t: 0.05, first=3)
    if hvd.rank() == 0:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(model, optimizer, 8, lambda t: 0.05, first=20)
    counts = hvd.allgather(torch.tensor([step_count(optimizer)]), name="test.count")
    assert len(set(counts.tolist())) == 1, counts
    same_everywhere(shared_model(model, optimizer), f"x, {compression}")


@several_ranks
@cases(EXACT, LOSSY)
def check_ranks_at_different_steps_take_the_largest(compression: Any) -> None:
    """Only rank 0 has loaded a state of another step, and nothing was broadcast: no rank hangs, replicas stay equal."""
    model, optimizer = make(compression, momentum=0.0)
    train(model, optimizer, 2, lambda t: 0.05)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3, lambda t: 0.05, first=2)
    if hvd.rank() == 0:
        optimizer.load_state_dict(state)
    train(model, optimizer, 4, lambda t: 0.05, first=5)
    assert step_count(optimizer) == 9
    if not has_local_models(compression):
        same_everywhere(shared_model(model, optimizer), f"x, {compression}")


@several_ranks
@cases(EXACT, LOSSY)
def check_backward_does_not_wait_for_other_ranks(compression: Any) -> None:
    """Rank 0 comes a second late to its backward pass; the others have long ended theirs."""
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    optimizer.zero_grad()
    if hvd.rank() == 0:
        time.sleep(1.0)
    begin = time.perf_counter()
    loss_of(model, hvd.rank(), 1).backward()
    seconds = time.perf_counter() - begin
    optimizer.step()
    assert seconds < 0.7, f"backward took {seconds:.2f} s"
    assert bool(torch.isfinite(flat(model)).all())
