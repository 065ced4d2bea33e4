"""Methods at the wrong moment: an error that says so on every rank, and training goes on."""

from __future__ import annotations

import copy
import pickle
from typing import Any, Callable

import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, DistEF, RandomBlock
from tests.multirank.support.cases import cases
from tests.multirank.support.networks import loss_of, network
from tests.multirank.support.refusals import Bad, refused
from tests.multirank.support.training import take_step, wrap

RANKS = (2,)
ALGORITHMS = (EF(RandomBlock(0.25)), DEF(RandomBlock(0.25)), DistEF(), LIEC())


def trained(compression: Any, kind: Any = torch.optim.SGD) -> tuple[nn.Module, Any]:
    """Return a model and its optimizer, which has stepped."""
    model = network()
    optimizer = wrap(model, kind(model.parameters(), lr=0.1), compression)
    take_step(model, optimizer, 0)
    return model, optimizer


def inside(act: Callable[[Any], Any], point: str = "shared") -> Callable[[Any], None]:
    """Return what acts inside a consensus."""

    def run(compression: Any) -> None:
        _, optimizer = trained(compression)
        with optimizer.consensus(point):
            act(optimizer)

    return run


def after_backward(act: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return what acts between backward and step, and then steps: the step is as if it had not been tried."""

    def run(compression: Any) -> None:
        model, optimizer = trained(compression)
        loss_of(model, 0, 1).backward()
        try:
            act(optimizer)
        finally:
            optimizer.step()

    return run


def enter(optimizer: Any) -> None:
    """Go to the shared model and back."""
    with optimizer.consensus():
        raise AssertionError("this consensus should have been refused")


def group() -> dict[str, Any]:
    """Return a parameter group."""
    return {"params": [nn.Parameter(torch.ones(2))]}


def backward_twice(compression: Any) -> None:
    """Run one backward pass more than there are in a step."""
    model, optimizer = trained(compression)
    try:
        for _ in range(2):
            loss_of(model, 0, 1).backward()
    finally:
        optimizer.step()


def backward_with_graph(compression: Any) -> None:
    """Ask for gradients that have a graph."""
    model, optimizer = trained(compression)
    try:
        loss_of(model, 0, 1).backward(create_graph=True)
    finally:
        optimizer.set_backward_passes_per_step(1)


def step_unsynchronized(compression: Any, backward: bool = True) -> None:
    """Skip a synchronize() that has not been."""
    model, optimizer = trained(compression)
    if backward:
        loss_of(model, 0, 1).backward()
    try:
        with optimizer.skip_synchronize():
            optimizer.step()
    finally:
        optimizer.step()


def step_twice_with_one_exchange(compression: Any) -> None:
    """Step twice after one synchronize()."""
    model, optimizer = trained(compression)
    loss_of(model, 0, 1).backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
        optimizer.step()


def step_of_a_copy(make_copy: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return what steps a copy of an optimizer."""
    return lambda compression: make_copy(trained(compression)[1]).step()


def loss_with_gradients(model: nn.Module) -> torch.Tensor:
    """Return the loss after its backward pass."""
    loss = loss_of(model, 0, 1)
    loss.backward()
    return loss


def virtual_of_adam(compression: Any) -> None:
    """Ask for the virtual iterate where only Adam can make an update of the residual."""
    _, optimizer = trained(compression, torch.optim.Adam)
    with optimizer.consensus("virtual"):
        raise AssertionError("this point should have been refused")


def step_in_inference_mode(compression: Any) -> None:
    """Step where no tensor may be written."""
    model, optimizer = trained(compression)
    loss_of(model, 0, 1).backward()
    try:
        with torch.inference_mode():
            optimizer.step()
    finally:
        optimizer.set_backward_passes_per_step(1)


CONSENSUS = "inside optimizer.consensus(point='shared') (rank {rank})"
INSIDE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "step": (lambda optimizer: optimizer.step(), "step()"),
    "synchronize": (lambda optimizer: optimizer.synchronize(), "synchronize()"),
    "consensus": (enter, "consensus()"),
    "flush": (lambda optimizer: optimizer.flush(), "flush()"),
    "adopt_parameters": (lambda optimizer: optimizer.adopt_parameters(), "adopt_parameters()"),
    "load_state_dict": (lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()), "load_state_dict()"),
    "add_param_group": (lambda optimizer: optimizer.add_param_group(group()), "add_param_group()"),
}
BETWEEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "consensus": (enter, "consensus()"),
    "flush": (lambda optimizer: optimizer.flush(), "flush()"),
    "adopt_parameters": (lambda optimizer: optimizer.adopt_parameters(), "adopt_parameters()"),
}
Act = Callable[[Any], None]
# What is done with an algorithm, fragments of its error, and the error's class.
MOMENTS: dict[str, tuple[Act, tuple[str, ...], type[BaseException]]] = {
    **{f"{name} inside": (inside(act), (text, CONSENSUS), RuntimeError) for name, (act, text) in INSIDE.items()},
    "step inside virtual": (inside(lambda o: o.step(), "virtual"), ("point='virtual'", "(rank {rank})"), RuntimeError),
    **{
        f"{name} between": (after_backward(act), (text, "between loss.backward()", "(rank {rank})"), RuntimeError)
        for name, (act, text) in BETWEEN.items()
    },
    "zero_grad between": (after_backward(lambda o: o.zero_grad()), ("zero_grad()", "race"), AssertionError),
    "backward twice": (backward_twice, ("more than backward_passes_per_step", "rank {rank}"), AssertionError),
    "create_graph": (backward_with_graph, ("create_graph=True", "rank {rank}"), AssertionError),
    "skip without synchronize": (
        step_unsynchronized,
        ("skip_synchronize()", "without optimizer.synchronize()", "(rank {rank})"),
        RuntimeError,
    ),
    "skip without backward": (
        lambda compression: step_unsynchronized(compression, backward=False),
        ("skip_synchronize()", "(rank {rank})"),
        RuntimeError,
    ),
    "skip twice": (step_twice_with_one_exchange, ("skip_synchronize()", "(rank {rank})"), RuntimeError),
    "inference mode": (step_in_inference_mode, ("inference_mode", "(rank {rank})"), RuntimeError),
    "step of a pickled copy": (
        step_of_a_copy(lambda o: pickle.loads(pickle.dumps(o))),
        ("a copy of a distributed one", "load"),
        RuntimeError,
    ),
    "step of a deep copy": (step_of_a_copy(copy.deepcopy), ("a copy of a distributed one",), RuntimeError),
}


@cases(compression=ALGORITHMS, moment=MOMENTS)
def check_moment(compression: Any, moment: tuple[Act, tuple[str, ...], type[BaseException]]) -> None:
    act, fragments, kind = moment
    refused(Bad(lambda: act(compression), fragments, kind))


@cases(EF(RandomBlock(0.25)), LIEC())
def check_virtual_iterate_of_adam(compression: Any) -> None:
    refused(
        Bad(lambda: virtual_of_adam(compression), ("point='virtual'", "(rank {rank}", "Adam", "shared"), RuntimeError)
    )


@cases(*ALGORITHMS)
def check_lbfgs_without_a_closure(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, torch.optim.LBFGS(model.parameters()), compression)
    loss_of(model, 0, 0).backward()
    refused(Bad(optimizer.step, ("closure",), TypeError))
    optimizer.zero_grad()
    optimizer.step(lambda: loss_with_gradients(model))
