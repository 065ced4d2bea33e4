"""Who owns a parameter: two optimizers in turn, parameters and groups put in by hand, copies of the optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, Dense, DistributedOptimizer, LowRank
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, exchanges_updates, has_local_models
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import residuals
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.reference import batch
from tests.multirank.support.training import make, mean_gradient, sgd, shared_model, train, virtual_iterate, wrap

RANKS = (2,)
FULL_RANKS = (3,)
DETACHED = (DEF(BLOCK), DEF(BLOCK, "auto"), DEF(BLOCK, 0.0, local_steps=2))


def in_turn(compression: Any, flush: bool, backward: bool = True) -> tuple[Any, list[Any], torch.Tensor]:
    """Train one model with two optimizers, three steps each in turn; return where exact training would have led.

    Args:
        flush: call flush() at the end of each turn.
        backward: hooks of both optimizers see the gradients; else they are made by hand.
    """
    model = network(torch.float64)
    both = [
        DistributedOptimizer(sgd(model), list(model.named_parameters(prefix=stage)), compression)
        for stage in ("first", "second")
    ]
    expected = flat(model)
    for t in range(12):
        optimizer = both[t // 3 % 2]
        expected -= 0.1 * mean_gradient(model, t)
        optimizer.zero_grad()
        if backward:
            loss_of(model, hvd.rank(), t).backward()
        else:
            parameters = list(model.parameters())
            for p, gradient in zip(parameters, torch.autograd.grad(loss_of(model, hvd.rank(), t), parameters)):
                p.grad = gradient
        optimizer.step()
        if flush and t % 3 == 2:
            optimizer.flush()
    return model, both, expected


@cases(compression=(EXACT, LOSSY), flush=(True, False), backward=(True, False))
def check_two_optimizers_in_turn(compression: Any, flush: bool, backward: bool) -> None:
    """Flushed at each turn they train as one; else too, where the parameters hold the shared model."""
    if not flush and (exchanges_updates(compression) or has_local_models(compression)):
        return  # those are the next check's, or exact anyway
    model, both, expected = in_turn(compression, flush, backward)
    for optimizer in reversed(both):
        optimizer.flush()
    close(flat(model), expected, 1e-9, f"the model, {compression}")
    same_everywhere(flat(model), "the model")


@cases(Dense(), EF(BLOCK), EF(LowRank(1)))
def check_two_losses_that_share_parameters(compression: Any) -> None:
    """Each optimizer has the trunk and a head of its own, and both step at every batch."""
    trunk = nn.Linear(5, 4).double()
    heads = [nn.Linear(4, 2).double() for _ in range(2)]
    hvd.broadcast_parameters(nn.ModuleList([trunk, *heads]).state_dict(), root_rank=0)
    both = [wrap(nn.Sequential(trunk, head), sgd(nn.Sequential(trunk, head)), compression) for head in heads]
    expected = flat(trunk)
    for t in range(6):
        for head, optimizer in zip(heads, both):
            inputs = torch.from_numpy(batch(hvd.rank(), t)[0])
            loss = head(trunk(inputs)).square().mean()
            gradients = torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True)
            expected -= 0.1 * hvd.allreduce(torch.cat([g.reshape(-1) for g in gradients]), name="test.gradient")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for optimizer in both:
        optimizer.flush()
    close(flat(trunk), expected, 1e-9, f"the trunk, {compression}")


@cases(*DETACHED)
def check_points_of_another_optimizer_are_refused_with_the_remedy(compression: Any) -> None:
    raises(
        ValueError,
        "another one trains parameter",
        "flush()",
        f"rank {hvd.rank()}",
        call=lambda: in_turn(compression, False),
    )
    model, both, _ = in_turn(compression, True)
    same_everywhere(shared_model(model, both[1]), "the model")


@cases(compression=(Dense(), LOSSY), how=("appended", "replaced", "reordered", "replaced group"))
def check_parameters_put_into_groups_by_hand(compression: Any, how: str) -> None:
    """They are taken in, and replicas stay equal; nothing is kept by a group's number."""
    model, optimizer = make(compression)
    if how in ("reordered", "replaced group"):
        first = {**optimizer.param_groups[0], "params": list(model[0].parameters())}
        optimizer.param_groups[:] = [first, {**first, "params": list(model[2].parameters())}]
    train(model, optimizer, 4, lambda t: 0.05)
    pending = virtual_iterate(model, optimizer)
    if how == "appended":
        model.append(nn.Linear(3, 3, bias=False))
        hvd.broadcast_(model[3].weight.data, root_rank=0, name="test.new")
        optimizer.param_groups[0]["params"].append(model[3].weight)
    elif how == "replaced":
        optimizer.flush()  # the new one begins with the same values on all ranks
        old = optimizer.param_groups[0]["params"][-1]
        optimizer.state.pop(old, None)
        model[2].bias = optimizer.param_groups[0]["params"][-1] = nn.Parameter(old.detach().clone())
    elif how == "reordered":
        optimizer.param_groups.reverse()
    else:
        optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    if how in ("reordered", "replaced group"):
        close(virtual_iterate(model, optimizer), pending, 1e-6, "the virtual iterate")
    train(model, optimizer, 4, lambda t: 0.05, first=4)
    same_everywhere(shared_model(model, optimizer), f"x, {compression}, {how}")


@cases(Dense(), LOSSY)
def check_copies_have_the_state_and_cannot_step(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 4, lambda t: 0.05)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        state = twin.state_dict()
        twin.zero_grad()
        raises(RuntimeError, "copy of a distributed one", "DistributedOptimizer", call=twin.step)
        again, resumed = make(compression, seed=2)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(state)
        if compression != Dense():
            assert torch.equal(residuals(resumed), residuals(optimizer))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    pickle.loads(pickle.dumps({"scheduler": scheduler.state_dict(), "optimizer": optimizer}))
    train(model, optimizer, 2, lambda t: 0.05, first=4)
    same_everywhere(shared_model(model, optimizer), "the original trains on")
