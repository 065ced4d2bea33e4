"""Horovod's contract of p.grad: what synchronize() leaves, clipping, missing gradients, gradients set by hand."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, Identity, Policy
from tests.multirank.support.algorithm_cases import EXACT, LOSSY, exchanges_updates
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases, without_mpi
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import local_gradient, mean_gradients, sgd, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


class Forked(nn.Module):
    """Branches of which ranks use different ones, so that each rank lacks gradients; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        out: torch.Tensor = self.branches[branch](x)
        return out


@cases(compression=(Dense(), EF(Identity())), op={"Average": hvd.Average, "Sum": hvd.Sum})
def check_synchronize_leaves_the_aggregate(compression: Any, op: Any) -> None:
    model = network()
    expected = mean_gradients(model)
    optimizer = wrap(model, sgd(model), compression, op=op)
    loss_of(model, hvd.rank(), 0).backward()
    optimizer.synchronize()
    factor = 1.0 if op == hvd.Average else float(hvd.size())
    for p, mean in zip(model.parameters(), expected):
        close(p.grad, mean * factor, 1e-6, f"p.grad with {compression}, op={op}")


@without_mpi
@cases(LOSSY, where=lambda c: not (isinstance(c, LIEC) or exchanges_updates(c)))
def check_the_aggregate_is_the_same_everywhere(compression: Any) -> None:
    """Lossy algorithms leave equal bits in p.grad; reference/every_compressor.py compares their values."""
    model = network()
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression)
    for t in range(4):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.synchronize()
        gradient = local_gradient(model)
        assert bool(gradient.any())
        same_everywhere(gradient, f"p.grad with {compression}")
        with optimizer.skip_synchronize():
            optimizer.step()


# Dense reduces in place as soon as a bucket is complete, as Horovod does.
@cases(EXACT, LOSSY, where=lambda c: not isinstance(c, (Dense, Policy)))
def check_local_gradients_can_be_read_before_the_step(compression: Any) -> None:
    """Between backward() and step() p.grad is this rank's gradient, at the first step and at later ones."""
    model, twin = network(), network()
    optimizer = wrap(model, sgd(model), compression, groups=2)
    for t in range(3):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss_of(twin, hvd.rank(), t).backward()
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            close(p.grad, q.grad, 1e-6, f"p.grad at step {t} with {compression}")
        optimizer.step()


@cases(EXACT, LOSSY)
def check_clipping_between_synchronize_and_step(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), t).backward()
        optimizer.synchronize()
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        after = torch.linalg.vector_norm(local_gradient(model))
        assert after < 1.01e-3 < before
        with warnings.catch_warnings(), optimizer.skip_synchronize():
            warnings.simplefilter("error")
            optimizer.step()
    with optimizer.consensus():
        same_everywhere(flat(model), "x")
        close(flat(model), flat(network()), 3 * 0.1 * 1.1e-3, "three clipped steps are short")


@cases(EXACT)
def check_clipping_acts_on_what_synchronize_leaves(compression: Any) -> None:
    """The mean or, where updates are exchanged, this rank's own gradient is clipped."""
    model, twin = network(torch.float64), network(torch.float64)
    optimizer = wrap(model, sgd(model), compression)
    loss_of(model, hvd.rank(), 0).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with optimizer.skip_synchronize():
        optimizer.step()
    loss_of(twin, hvd.rank(), 0).backward()
    local = exchanges_updates(compression)
    gradient = local_gradient(twin)
    gradient = gradient if local else hvd.allreduce(gradient, name="test.clip.first")
    clipped = 0.01 * gradient / torch.linalg.vector_norm(gradient)
    clipped = hvd.allreduce(clipped, name="test.clip.last") if local else clipped
    with optimizer.consensus():
        close(flat(network(torch.float64)) - flat(model), 0.1 * clipped, 1e-4, f"the step with {compression}")


@cases(EXACT, LOSSY)
def check_order_of_hooks_does_not_matter(compression: Any) -> None:
    results = []
    for shuffled in (False, True):
        torch.manual_seed(0)
        parameters = nn.ParameterList([nn.Parameter(torch.randn(40)) for _ in range(6)])
        optimizer = wrap(parameters, sgd(parameters), compression, groups=3)
        for _ in range(6):
            optimizer.zero_grad()
            order = list(parameters)
            if shuffled and hvd.rank() % 2:
                order.reverse()
            for k, p in enumerate(order):  # one backward pass each: the hooks fire in this order
                index = len(order) - 1 - k if shuffled and hvd.rank() % 2 else k
                ((p * (index + 1 + hvd.rank())) ** 2).mean().backward()
            optimizer.step()
        results.append(flat(parameters))
    assert torch.equal(results[0], results[1]), f"order changes the result of {compression}"


@cases(compression=(Dense(), EF(Identity()), DEF(Identity())), recipe=("step", "synchronize", "closure"))
def check_missing_gradients_count_as_zeros(compression: Any, recipe: str) -> None:
    """Momentum and weight decay act on them, also of parameters that no rank has used."""
    results = []
    for distributed in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        optimizer: Any = wrap(model, plain, compression) if distributed else plain
        for t in range(6):
            loss = model[(hvd.rank() + t) % 2](torch.ones(2, 3)).square().sum()
            optimizer.zero_grad()
            if not distributed:
                loss.backward()
                # One rank trains as the wrapped optimizer does: without a gradient it takes no step.
                for name, p in model.named_parameters() if hvd.size() > 1 else ():
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    p.grad = hvd.allreduce(grad, name=f"test.missing.{name}")
                optimizer.step()
            elif recipe == "closure":
                optimizer.step(lambda: (loss.backward(), loss)[1])  # noqa: B023
            else:
                loss.backward()
                if recipe == "synchronize":
                    optimizer.synchronize()
                    assert hvd.size() == 1 or all(p.grad is not None for p in model.parameters())
                    with optimizer.skip_synchronize():
                        optimizer.step()
                else:
                    optimizer.step()
        if distributed:
            with optimizer.consensus():
                results.append(flat(model))
        else:
            results.append(flat(model))
    close(results[0], results[1], 1e-5, f"parameters with {compression}, {recipe}")


@cases(EXACT, LOSSY)
def check_gradients_missing_on_some_ranks(compression: Any) -> None:
    model = Forked()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
    for t in range(8):
        optimizer.zero_grad()
        model(torch.ones(2, 3), (hvd.rank() + t) % 4).sum().backward()
        optimizer.step()
    optimizer.flush()
    same_everywhere(flat(model), f"parameters with {compression}")
    # Over 8 steps each branch got the gradient of ones from each rank twice: mean over ranks, summed.
    for name, p in model.named_parameters():
        drop = 0.0 if name.startswith("unused") else 0.1 * 2 * 2
        close(p.detach(), before[name] - drop, 1e-5, f"{name} with {compression}")


@without_mpi
@cases(EXACT, where=lambda c: not exchanges_updates(c))
def check_gradients_may_be_given_new_memory(compression: Any) -> None:
    """``p.grad.data = ...`` after ``synchronize()`` or after ``step()``, as clipping by hand or ``Module.to`` does."""
    results = []
    for exchanged in (True, False):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression)
        for t in range(6):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.synchronize()
            for p in model.parameters():
                assert p.grad is not None
                if exchanged:
                    p.grad.data = p.grad.data.clamp(-0.1, 0.1)
                else:
                    p.grad.clamp_(-0.1, 0.1)
            with optimizer.skip_synchronize():
                optimizer.step()
            for p in model.parameters() if exchanged else ():
                assert p.grad is not None
                p.grad.data = torch.zeros_like(p.grad)
        same_everywhere(flat(model), f"p.grad.data = ... with {compression}")
        results.append(flat(model))
    close(results[1], results[0], 1e-12, f"p.grad.data = ... with {compression}")


@cases(EXACT)
def check_gradients_set_after_a_closure_are_exchanged(compression: Any) -> None:
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, plain = wrap(model, sgd(model), compression), sgd(twin)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), 0)
        loss.backward()
        return loss, "and more"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, more = optimizer.step(closure)
        assert more == "and more" and loss.numel() == 1
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + hvd.rank())
        optimizer.step()
    gradients = torch.autograd.grad(loss_of(twin, hvd.rank(), 0), list(twin.parameters()))
    for p, gradient in zip(twin.parameters(), gradients):
        p.grad = hvd.allreduce(gradient, name="test.mean")
    plain.step()
    for p in twin.parameters():
        p.grad = torch.full_like(p, (1.0 + hvd.size()) / 2)
    plain.step()
    with optimizer.consensus():
        close(flat(model), flat(twin), 1e-12, f"gradients set by hand with {compression}")


@cases(Dense(), EF(Identity()), LIEC(Identity()))
def check_several_ranks_refuse_graphs_of_gradients(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), 0)
        if hvd.size() > 1:
            raises(
                AssertionError,
                "create_graph=True",
                f"rank {hvd.rank()}",
                "autograd.grad",
                call=partial(loss.backward, create_graph=True),
            )
            optimizer.set_backward_passes_per_step(1)
        else:
            loss.backward(create_graph=True)
            optimizer.step()
