"""Groups of gradients, which share a bucket; groups of parameters, which have settings of their own; policies."""

from __future__ import annotations

import warnings
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, Dense, Policy, RandomBlock
from tests.multirank.support.algorithm_cases import BLOCKS, EXACT, LOSSY, exchanges_updates
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.internals import buckets, residual_by_name
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import sgd, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


# Updates are exchanged after the step, all together.
@cases(
    compression=(EXACT, *BLOCKS),
    groups={
        "lists": ([[0, 3], [1]], [{"0.weight", "2.bias"}, {"0.bias"}, {"2.weight"}]),
        "4": (4, [{"0.weight"}, {"0.bias"}, {"2.weight"}, {"2.bias"}]),
        "1": (1, [{"0.weight", "0.bias", "2.weight", "2.bias"}]),
    },
    where=lambda compression, groups: not exchanges_updates(compression),
)
def check_groups_decide_which_parameters_share_a_bucket(compression: Any, groups: Any) -> None:
    form, wanted = groups
    model = network()
    p = list(model.parameters())
    groups = [[p[i] for i in group] for group in form] if isinstance(form, list) else form
    optimizer = wrap(model, sgd(model), compression, groups=groups)
    train(model, optimizer, 2, lambda t: 0.1)
    found = buckets(optimizer)
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted)), f"{found} with {compression}, {groups}"


@cases(EXACT, *BLOCKS)
def check_groups_change_nothing(compression: Any) -> None:
    results = []
    for form in (None, 1, 3, "lists"):
        model = network()
        p = list(model.parameters())
        groups: Any = [[p[0], p[3]], [p[1]]] if form == "lists" else form
        optimizer = wrap(model, sgd(model, momentum=0.9), compression, groups=groups)
        train(model, optimizer, 10, lambda t: 0.1)
        results.append(flat(model))
    for other in results[1:]:
        close(other, results[0], 1e-5, f"parameters with {compression}")


@cases(EXACT, LOSSY)
def check_one_group_per_parameter(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, groups=4)
    train(model, optimizer, 4, lambda t: 0.05)
    with optimizer.consensus():
        same_everywhere(flat(model), f"x with {compression}")


@cases(EXACT, *BLOCKS)
def check_lists_of_groups_may_differ_in_order(compression: Any) -> None:
    model = network()
    p = list(model.parameters())
    groups = [[p[0], p[2]], [p[1]]] if hvd.rank() == 0 else [[p[1]], [p[2], p[0]]]
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, groups=groups)
    train(model, optimizer, 3, lambda t: 0.05)
    with optimizer.consensus():
        same_everywhere(flat(model), f"x with {compression}")


@several_ranks
def check_lists_of_groups_may_differ_in_nothing_else() -> None:
    model = network()
    p = list(model.parameters())
    other = [[p[0], p[2 if hvd.rank() == 0 else 3]]]
    raises(
        ValueError,
        "groups",
        "disagree",
        f"this is rank {hvd.rank()}",
        call=lambda: wrap(model, torch.optim.SGD(p, lr=0.1), Dense(), groups=other),
    )


def check_the_old_name_of_groups() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = wrap(model, sgd(model), Dense(), num_groups=4)
    train(model, optimizer, 1, lambda t: 0.1)
    assert len(buckets(optimizer)) == 4


def check_parameter_groups_choose_algorithms() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    policy = Policy(EF(RandomBlock(0.25)), groups={1: Dense()})
    optimizer = wrap(model, torch.optim.SGD(groups, lr=0.05), policy)
    train(model, optimizer, 3, lambda t: 0.05)
    assert set(residual_by_name(optimizer)) == {"0.weight", "0.bias"}
    same_everywhere(flat(model), "parameters")


@cases(EXACT)
def check_parameter_groups_with_learning_rates_of_their_own(compression: Any) -> None:
    """Two groups with rates that change at different steps train as by the wrapped optimizer on mean gradients."""
    model, twin = network(torch.float64), network(torch.float64)

    def grouped(m: nn.Sequential) -> torch.optim.SGD:
        second: dict[str, Any] = {"params": m[2].parameters(), "lr": 0.01, "weight_decay": 0.1}
        return torch.optim.SGD([{"params": m[0].parameters()}, second], lr=0.05, momentum=0.9)

    optimizer, plain = wrap(model, grouped(model), compression), grouped(twin)
    for t in range(20):
        for o in (optimizer, plain):
            o.param_groups[0]["lr"] = 0.05 / (1 + t)
            o.param_groups[1]["lr"] = 0.01 if t < 10 else 0.001
            o.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        loss_of(twin, hvd.rank(), t).backward()
        for name, p in twin.named_parameters():
            p.grad = hvd.allreduce(p.grad, name=f"test.{name}")
        plain.step()
    close(flat(model), flat(twin), 1e-12, f"parameters with {compression}")


@cases(
    default=(EF(RandomBlock(0.25)), DEF(RandomBlock(0.25), 0.0)),
    rule={
        "dense_dims": {"dense_dims": 1},
        "dense_below": {"dense_below": 10},
        "bias": {"patterns": {"*.bias": Dense()}},
    },
)
def check_a_policy_keeps_small_tensors_dense(default: Any, rule: dict[str, Any]) -> None:
    """Biases are sent dense, all else in blocks: only the mean of biases is exact."""
    policy: Any = Policy(default, **rule)
    model = network(torch.float64)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    twin = network(torch.float64)
    loss_of(twin, hvd.rank(), 0).backward()
    train(model, optimizer, 1, lambda t: 0.1)
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        mean = hvd.allreduce(q.grad, name=f"test.policy.{name}")
        exact = torch.allclose(p.detach(), q.detach() - 0.1 * mean, rtol=1e-12, atol=1e-13)
        assert exact == name.endswith("bias"), f"{name} with {policy}"
