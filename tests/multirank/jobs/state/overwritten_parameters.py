"""Parameters overwritten between steps: equal on all ranks they become the model, else they are part of an update."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from hvd_compress import DEF, DistEF, Policy
from tests.multirank.support.algorithm_cases import BLOCK, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.internals import residuals, shared_copy
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import make, shared_model, train, virtual_iterate

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
# With a copy of the shared model.
SHARING = (DEF(BLOCK, 0.0), DEF(BLOCK, 0.3), DEF(BLOCK, "auto"), DistEF(), Policy(DEF(BLOCK), dense_dims=1))
HEAD = 5 * 7 + 7  # where the last layer begins


def trained(compression: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return a network and its optimizer after six steps."""
    model, optimizer = make(compression, dtype)
    train(model, optimizer, 6, lambda t: 0.05)
    return model, optimizer


def with_head(x: Tensor, point: Tensor, new: nn.Linear) -> Tensor:
    """Return ``x`` with the new head; a single rank may have clipped its weights, so x moves as its point does."""
    head = torch.cat((new.weight.flatten(), new.bias)).detach()
    return torch.cat((x[:HEAD], head if hvd.size() > 1 else x[HEAD:] + head - point[HEAD:]))


def load(head: nn.Linear, new: nn.Linear) -> None:
    """Load the new head on all ranks."""
    head.load_state_dict(new.state_dict())


def broadcast(head: nn.Linear, new: nn.Linear) -> None:
    """Load the new head on rank 0 and broadcast it."""
    if hvd.rank() == 0:
        head.load_state_dict(new.state_dict())
    hvd.broadcast_parameters(head.state_dict(), root_rank=0)


def broadcast_from_the_last(head: nn.Linear, new: nn.Linear) -> None:
    """Load the new head on the last rank and broadcast it."""
    if hvd.rank() == hvd.size() - 1:
        head.load_state_dict(new.state_dict())
    hvd.broadcast_parameters(head.state_dict(), root_rank=hvd.size() - 1)


def put_in_new_storage(head: nn.Linear, new: nn.Linear) -> None:
    """Give the parameters new memory with the values of the new head."""
    head.weight.data, head.bias.data = new.weight.detach().clone(), new.bias.detach().clone()


WAYS: tuple[Callable[[nn.Linear, nn.Linear], None], ...] = (
    load,
    broadcast,
    broadcast_from_the_last,
    put_in_new_storage,
)


@cases(compression=SHARING, way=WAYS)
def check_an_overwritten_head_becomes_the_model(compression: Any, way: Callable[[nn.Linear, nn.Linear], None]) -> None:
    """It does so at once: nothing of the change is an update, and the other layer does not change."""
    what = f"{compression}, {way.__name__}"
    model, optimizer = trained(compression, torch.float64)
    x, point, before = shared_model(model, optimizer), flat(model), residuals(optimizer)
    new = network(torch.float64, seed=4)[2]
    way(model[2], new)
    moved = shared_model(model, optimizer)
    close(moved, with_head(x, point, new), 0.0 if hvd.size() > 1 else 1e-14, f"x, {what}")
    assert torch.equal(residuals(optimizer), before), f"residuals, {what}"
    y = virtual_iterate(model, optimizer)
    train(model, optimizer, 1, lambda t: 0.0, first=6)
    close(virtual_iterate(model, optimizer), y, 1e-12, f"the change is no update, {what}")
    train(model, optimizer, 3, lambda t: 0.05, first=7)
    same_everywhere(shared_model(model, optimizer), f"x, {what}")


@cases(compression=SHARING, way=WAYS)
def check_a_head_overwritten_before_backward(compression: Any, way: Callable[[nn.Linear, nn.Linear], None]) -> None:
    """The step notices it at its first gradient, without ``consensus()`` before."""
    what = f"{compression}, {way.__name__}"
    model, optimizer = trained(compression, torch.float64)
    x, y, point = shared_model(model, optimizer), virtual_iterate(model, optimizer), flat(model)
    new = network(torch.float64, seed=4)[2]
    way(model[2], new)
    train(model, optimizer, 1, lambda t: 0.0, first=6)
    close(virtual_iterate(model, optimizer), with_head(x, point, new) - (x - y), 1e-12, what)
    same_everywhere(shared_model(model, optimizer), f"x, {what}")


@several_ranks
@cases(*SHARING)
def check_the_unchanged_head_of_one_rank_broadcast(compression: Any) -> None:
    """Rank 0 broadcasts its own head without having loaded another, and sees no change."""
    model, optimizer = trained(compression)
    x = shared_model(model, optimizer)
    head = hvd.broadcast(flat(model)[HEAD:], root_rank=0, name="test.head")
    hvd.broadcast_parameters(model[2].state_dict(), root_rank=0)
    moved = shared_model(model, optimizer)
    assert torch.equal(moved, torch.cat((x[:HEAD], head))), f"{compression}"
    assert torch.equal(moved, shared_copy(optimizer)), f"{compression}"


@cases(*SHARING)
def check_a_loaded_model_is_used_unchanged(compression: Any) -> None:
    """The next forward pass uses the parameters that the user has loaded."""
    model, optimizer = trained(compression)
    model.load_state_dict(network(seed=4).state_dict())
    x = shared_model(model, optimizer)
    if hvd.size() > 1:
        assert torch.equal(x, flat(network(seed=4))), f"{compression}"
    assert torch.equal(flat(model), flat(network(seed=4))), f"{compression}"


@several_ranks
@cases(LOSSY_WITH_OPTIONS)
def check_parameters_broadcast_in_mid_training_become_the_model(compression: Any) -> None:
    model, optimizer = trained(compression)
    before = residuals(optimizer)
    if hvd.rank() == 0:
        model.load_state_dict(network(seed=4).state_dict())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # A mean of equal numbers may round (LIEC at three ranks).
    close(shared_model(model, optimizer), flat(network(seed=4)), 1e-7, f"x with {compression}")
    assert torch.equal(residuals(optimizer), before)
    train(model, optimizer, 1, lambda t: 0.0, first=5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # rank 0's own point
    point = flat(model)
    train(model, optimizer, 1, lambda t: 0.0, first=6)
    x = shared_model(model, optimizer)
    same_everywhere(x, f"x with {compression}")
    close(x, point, 0.2, f"x is near the point that was broadcast, {compression}")


@several_ranks
@cases(compression=SHARING, layers=((0,), (2,), (0, 2)))
def check_different_changes_are_part_of_updates(compression: Any, layers: tuple[int, ...]) -> None:
    """The shared model does not change, and the virtual iterate moves by the mean of the ranks' changes."""
    what = f"{compression}, layers {layers}"
    model, optimizer = trained(compression, torch.float64)
    x, y, point = shared_model(model, optimizer), virtual_iterate(model, optimizer), flat(model)
    bound = 0.1 + 0.02 * hvd.rank()
    with torch.no_grad():
        for parameter in (p for layer in layers for p in model[layer].parameters()):
            parameter.clamp_(-bound, bound)
    change = hvd.allreduce(flat(model) - point, name="test.change")
    assert torch.equal(shared_model(model, optimizer), x), what
    train(model, optimizer, 1, lambda t: 0.0, first=6)
    close(virtual_iterate(model, optimizer), y + change, 1e-12, what)
    same_everywhere(shared_model(model, optimizer), f"x, {what}")


@cases(compression=SHARING, layers=((2,), (0, 2)))
def check_weights_clipped_after_every_step(compression: Any, layers: tuple[int, ...]) -> None:
    """Weights are clipped, as Wasserstein GANs do: one rank's do not become the model."""
    model, optimizer = trained(compression)
    for t in range(20):
        train(model, optimizer, 1, lambda t: 0.05, first=t)
        with torch.no_grad():
            for parameter in (p for layer in layers for p in model[layer].parameters()):
                parameter.clamp_(-0.1, 0.1)
    x = shared_model(model, optimizer)
    same_everywhere(x, f"x, {compression}, layers {layers}")
    assert torch.isfinite(x).all()
    assert not torch.equal(x, flat(network()))
