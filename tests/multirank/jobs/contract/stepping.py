"""Horovod's contract of ``step()``: class, closures, zero_grad, hooks, passes, a step discarded, torch.compile."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, DistEF, DistributedOptimizer, RandomBlock, TopK
from tests.multirank.support.algorithm_cases import BLOCKS, EXACT, LOSSY, is_exact
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import mean_gradients, sgd, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


@cases(EXACT, LOSSY)
def check_class_and_attributes(compression: Any) -> None:
    model = network()
    plain = sgd(model, momentum=0.9)
    optimizer = wrap(model, plain, compression)
    assert issubclass(type(optimizer), torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    assert optimizer._parameter_names == {p: n for n, p in model.named_parameters()}
    assert optimizer.defaults["lr"] == 0.1, "the user's defaults, for groups added later"
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2, lambda t: 0.1)
        scheduler.step()


def check_names_of_parameters() -> None:
    """Horovod's names where none are given; names of other parameters do no harm."""
    model = network()
    optimizer = DistributedOptimizer(sgd(model))
    assert sorted(optimizer._parameter_names.values()) == [f"allreduce.noname.0.{j}" for j in range(4)]
    named = [*model.named_parameters(), ("extra", nn.Parameter(torch.zeros(2)))]
    DistributedOptimizer(sgd(model), named_parameters=named)


@cases(EXACT, LOSSY)
def check_step_after_synchronize_warns(compression: Any) -> None:
    results = []
    for twice in (False, True):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        loss_of(model, hvd.rank(), 0).backward()
        if twice:
            optimizer.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert twice == any("skip_synchronize" in str(w.message) for w in caught)
        results.append(flat(model))
    assert torch.equal(results[0], results[1]), "a second synchronize() must not count gradients twice"


@cases(EXACT, LOSSY)
def check_zero_grad(compression: Any) -> None:
    results = []
    for to_none in (True, False):
        model = network()
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)
        for t in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            if t:
                assert all((p.grad is None) == to_none for p in model.parameters())
                assert to_none or all(not p.grad.any() for p in model.parameters())
            loss_of(model, hvd.rank(), t).backward()
            if hvd.size() > 1:  # as in Horovod: one rank has no exchange to race with
                raises(AssertionError, "race condition", call=optimizer.zero_grad)
            optimizer.step()
        results.append(flat(model))
    assert torch.equal(results[0], results[1]), f"set_to_none changes the result of {compression}"


@cases(EXACT, LOSSY, DEF(RandomBlock(density=0.25), clip_norm=0.05))
def check_closures(compression: Any) -> None:
    results = []
    for with_closure in (False, True):
        model = network()
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)
        for t in range(5):

            def closure(t: int = t, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, hvd.rank(), t)
                loss.backward()
                return loss

            if with_closure:
                loss = optimizer.step(closure)
                assert loss is not None
            else:
                closure()
                optimizer.step()
        results.append(flat(model))
    assert torch.equal(results[0], results[1]), f"a closure changes the result of {compression}"


@cases(EXACT, *BLOCKS)
def check_lbfgs_closure_keeps_ranks_together(compression: Any) -> None:
    """A line search calls the closure equally often on all ranks or, where updates are exchanged, on each at will."""
    model = network()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=5, line_search_fn="strong_wolfe")
    optimizer = wrap(model, lbfgs, compression)
    runs = 0

    def closure() -> torch.Tensor:
        nonlocal runs
        runs += 1
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), 0)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    assert runs > 3
    if is_exact(compression):
        assert losses[-1] < losses[0] / 2, f"{losses} with {compression}"
    with optimizer.consensus():
        same_everywhere(flat(model), f"x with {compression}")


@cases(EXACT, LOSSY)
def check_step_hooks_fire_once(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    train(model, optimizer, 2, lambda t: 0.1)
    assert seen == ["pre", "post"] * 2, seen


def check_post_hook_sees_the_exchanged_model() -> None:
    model = network()
    optimizer = wrap(model, sgd(model), DEF(RandomBlock(density=1.0)))
    optimizer.register_step_post_hook(lambda *a: same_everywhere(flat(model), "parameters in a post hook"))
    train(model, optimizer, 2, lambda t: 0.1)


@cases(EXACT, LOSSY)
def check_a_begun_step_can_be_discarded(compression: Any) -> None:
    """load_state_dict() and set_backward_passes_per_step() in the middle of a step discard its exchange."""
    model = network()
    optimizer = wrap(model, sgd(model, momentum=0.9), compression, groups=2)
    train(model, optimizer, 2, lambda t: 0.1)
    with optimizer.consensus():
        weights = {n: v.clone() for n, v in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    results = []
    for interrupted in (False, True):
        if interrupted:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), 7).backward()
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        if interrupted:
            loss_of(model, hvd.rank(), 8).backward()
            optimizer.set_backward_passes_per_step(1)
            optimizer.load_state_dict(copy.deepcopy(state))
        train(model, optimizer, 3, lambda t: 0.1, first=2)
        results.append(flat(model))
    assert torch.equal(results[0], results[1]), f"{compression}"


@cases(EXACT)
def check_backward_passes_per_step(compression: Any) -> None:
    model = network()
    expected = mean_gradients(model, (0, 1, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = wrap(model, sgd(model), compression, backward_passes_per_step=2)
    optimizer.set_backward_passes_per_step(3)
    assert optimizer.backward_passes_per_step == 3
    for t in range(3):
        loss_of(model, hvd.rank(), t).backward()
    extra = loss_of(model, hvd.rank(), 3)
    if hvd.size() > 1:  # as in Horovod, which counts no passes of one rank
        raises(AssertionError, "backward_passes_per_step", "parameter '", call=extra.backward)
    # Torch has added the gradient of the refused pass already: remove it.
    optimizer.set_backward_passes_per_step(3)
    for p in model.parameters():
        p.grad = None
    for t in range(3):
        loss_of(model, hvd.rank(), t).backward()
    optimizer.step()
    for p, b, mean in zip(model.parameters(), before, expected):
        close(p.detach(), b - 0.1 * mean, 1e-6, f"parameters with {compression}")
    optimizer.zero_grad()
    loss_of(model, hvd.rank(), 0).backward()  # stepping before the passes are complete is allowed
    optimizer.step()


@cases(EXACT, LOSSY)
def check_accumulated_passes_are_one_pass_of_the_sum(compression: Any) -> None:
    results = []
    for passes in (1, 2):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, backward_passes_per_step=passes)
        for t in range(5):
            optimizer.zero_grad()
            losses = [loss_of(model, hvd.rank(), 2 * t + i) for i in range(2)]
            for loss in losses if passes == 2 else [losses[0] + losses[1]]:
                loss.backward()
            optimizer.step()
        results.append(flat(model))
    close(results[1], results[0], 1e-9, f"parameters with {compression}")


@cases(Dense(), EF(RandomBlock(0.25)), EF(TopK(0.25)), DEF(RandomBlock(0.25)), DistEF(), LIEC())
def check_a_compiled_training_step(compression: Any) -> None:
    results = []
    for compiled in (False, True):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)

        def step(inputs: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for t in range(4):
            run(torch.full((2, 5), 1.0 + t + hvd.rank(), dtype=torch.float64))
        results.append(flat(model))
    close(results[1], results[0], 1e-12, f"compiled, {compression}")
