"""Parameters that are frozen, unfrozen, added, of odd shapes and dtypes, or get new memory."""

from __future__ import annotations

from typing import Any, Callable, Optional

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, LIEC, Dense, DistEF
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import sgd, shared_model, take_step, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


class Rebinding(torch.optim.Optimizer):
    """Gradient descent with new memory for parameters, no learning rate, and torch's former ``zero_grad``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None})

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Optional[Callable[[], Any]] = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - 0.1 * p.grad


@cases(EXACT, LOSSY)
def check_frozen_parameters_do_not_change(compression: Any) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), compression)
    train(model, optimizer, 5, lambda t: 0.1)
    assert torch.equal(before, model[0].weight.detach())
    assert model[0].weight.grad is None


@cases(EXACT)
def check_unfrozen_parameters_are_trained(compression: Any) -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
    train(model, optimizer, 2, lambda t: 0.1)
    model[0].weight.requires_grad_(True)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 3, lambda t: 0.1, first=2)
    assert not torch.equal(before, model[0].weight.detach())
    same_everywhere(flat(model), f"parameters with {compression}")


@cases(EXACT)
def check_added_parameter_group(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9), compression)
    train(model, optimizer, 2, lambda t: 0.05)
    for p in model[2].parameters():
        p.grad = None
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert optimizer.param_groups[1]["lr"] == 0.05
    assert optimizer._parameter_names[model[2].weight] == "2.weight"
    before = model[2].weight.detach().clone()
    train(model, optimizer, 3, lambda t: 0.05, first=2)
    assert not torch.equal(before, model[2].weight.detach())
    same_everywhere(flat(model), f"parameters with {compression}")


@cases(EXACT, LOSSY)
def check_channels_last_and_odd_shapes(compression: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scalar = nn.Parameter(torch.ones(()))
    model.register_parameter("scalar", scalar)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
    strides = [p.stride() for p in model.parameters()]
    for t in range(4):
        torch.manual_seed(100 * t + hvd.rank())
        optimizer.zero_grad()
        inputs = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        (model(inputs).square().mean() * scalar).backward()
        optimizer.step()
    assert [p.stride() for p in model.parameters()] == strides
    with optimizer.consensus():
        same_everywhere(flat(model), f"parameters with {compression}")


@cases(EXACT, LOSSY)
def check_a_model_may_take_another_memory_format(compression: Any) -> None:
    """Between steps, and evaluated at once: the elements of all flat vectors keep their order."""
    points: list[list[torch.Tensor]] = [[], []]
    for changes, points_of_run in enumerate(points):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2)).double()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
        for t in range(9):
            if changes and t % 3 == 2:
                other = torch.channels_last if t != 5 else torch.contiguous_format
                model.to(memory_format=other)  # type: ignore[call-overload]
            with optimizer.consensus():
                points_of_run.append(flat(model))
            torch.manual_seed(100 * t + hvd.rank())
            optimizer.zero_grad()
            model(torch.randn(4, 3, 5, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer.flush()
        points_of_run.append(flat(model))
    for t, (plain, changed) in enumerate(zip(*points)):
        close(changed, plain, 1e-9, f"step {t} with {compression}")


@cases(EXACT, LOSSY)
def check_an_optimizer_may_give_parameters_new_memory(compression: Any) -> None:
    results = []
    for build in (lambda m: sgd(m), lambda m: Rebinding(m.parameters())):
        model = network(torch.float64)
        optimizer = wrap(model, build(model), compression)
        for t in range(6):
            take_step(model, optimizer, t)
        results.append(shared_model(model, optimizer))
    close(results[1], results[0], 1e-12, f"p.data = ... in step() with {compression}")


@cases(DEF(BLOCK), LIEC(), DistEF())
def check_parameters_that_share_memory_are_refused(compression: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    optimizer = wrap(model, sgd(model), compression)
    model(torch.ones(1, 3)).sum().backward()
    raises(ValueError, "'0.weight'", "'1.weight'", "share memory", call=optimizer.step)


@cases(Dense(), DEF(BLOCK), DistEF(), LIEC())
def check_a_model_converted_in_the_middle_is_refused(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    train(model, optimizer, 2, lambda t: 0.05)
    optimizer.zero_grad()
    model.double()

    def step() -> None:
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.step()

    raises(RuntimeError, "torch.float64", "torch.float32", "before the first step", call=step)


@cases(EXACT, LOSSY)
def check_another_default_dtype(compression: Any) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 3, lambda t: 0.05)
        optimizer.flush()
    finally:
        torch.set_default_dtype(torch.float32)
    same_everywhere(flat(model), f"float32 where bfloat16 is the default, {compression}")
