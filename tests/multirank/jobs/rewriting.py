"""Parameters written between steps: the same on all ranks they are the model's, else part of a rank's update."""

from __future__ import annotations

from typing import Any, Callable

import everything
import harness
import horovod.torch as hvd
import torch
from common import close, flat, held, network, same_everywhere, saved, shared, train, virtual, wrap
from everything import BLOCK
from torch import Tensor, nn

from hvd_compress import DEF, LIEC, DistEF, Policy

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
LOSSY = (*everything.LOSSY, DEF(BLOCK, 0.0), DEF(BLOCK, "auto"), Policy(LIEC(BLOCK, 4), dense_dims=1))
# With a shared model of their own.
SHARING = (DEF(BLOCK, 0.0), DEF(BLOCK, 0.3), DEF(BLOCK, "auto"), DistEF(), Policy(DEF(BLOCK), dense_dims=1))
HEAD = 5 * 7 + 7  # where the last layer begins


def trained(compression: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    model = network(dtype)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
    train(model, optimizer, 6, lambda t: 0.05)
    return model, optimizer


def with_head(x: Tensor, point: Tensor, new: nn.Linear) -> Tensor:
    """The model with the head rewritten; of one rank alone, which may just have clipped, x moves as its point does."""
    head = torch.cat((new.weight.flatten(), new.bias)).detach()
    return torch.cat((x[:HEAD], head if hvd.size() > 1 else x[HEAD:] + head - point[HEAD:]))


def load(head: nn.Linear, new: nn.Linear) -> None:
    head.load_state_dict(new.state_dict())


def broadcast(head: nn.Linear, new: nn.Linear) -> None:
    """Only rank 0 has the new head."""
    if hvd.rank() == 0:
        head.load_state_dict(new.state_dict())
    hvd.broadcast_parameters(head.state_dict(), root_rank=0)


def broadcast_from_elsewhere(head: nn.Linear, new: nn.Linear) -> None:
    if hvd.rank() == hvd.size() - 1:
        head.load_state_dict(new.state_dict())
    hvd.broadcast_parameters(head.state_dict(), root_rank=hvd.size() - 1)


def put_in_new_storage(head: nn.Linear, new: nn.Linear) -> None:
    head.weight.data, head.bias.data = new.weight.detach().clone(), new.bias.detach().clone()


WAYS: tuple[Callable[[nn.Linear, nn.Linear], None], ...] = (
    load,
    broadcast,
    broadcast_from_elsewhere,
    put_in_new_storage,
)


def check_a_head_rewritten_becomes_the_model() -> None:
    """At once, and nothing of the change is counted as an update; the body is left alone."""
    for compression in SHARING:
        for way in WAYS:
            what = f"{compression}, {way.__name__}"
            model, optimizer = trained(compression, torch.float64)
            x, point, owed = shared(model, optimizer), flat(model), held(optimizer)
            new = network(torch.float64, seed=4)[2]
            way(model[2], new)
            moved = shared(model, optimizer)
            close(moved, with_head(x, point, new), 0.0 if hvd.size() > 1 else 1e-14, f"x, {what}")
            assert torch.equal(held(optimizer), owed), f"what is held back, {what}"
            y = virtual(model, optimizer)
            train(model, optimizer, 1, lambda t: 0.0, first=6)
            close(virtual(model, optimizer), y, 1e-12, f"nothing is owed but what was, {what}")
            train(model, optimizer, 3, lambda t: 0.05, first=7)
            same_everywhere(shared(model, optimizer), f"x, {what}")


def check_a_head_rewritten_before_backward() -> None:
    """Without a look at the consensus before: the step finds it, its first gradient being there."""
    for compression in SHARING:
        for way in WAYS:
            what = f"{compression}, {way.__name__}"
            model, optimizer = trained(compression, torch.float64)
            x, y, point = shared(model, optimizer), virtual(model, optimizer), flat(model)
            new = network(torch.float64, seed=4)[2]
            way(model[2], new)
            train(model, optimizer, 1, lambda t: 0.0, first=6)
            close(virtual(model, optimizer), with_head(x, point, new) - (x - y), 1e-12, what)
            same_everywhere(shared(model, optimizer), f"x, {what}")


def check_the_head_of_one_rank_broadcast_as_it_stands() -> None:
    """``hvd.broadcast_parameters(head.state_dict())``, nothing having been loaded: rank 0 sees no change."""
    if hvd.size() == 1:
        return
    for compression in SHARING:
        model, optimizer = trained(compression)
        x = shared(model, optimizer)
        head = hvd.broadcast(flat(model)[HEAD:], root_rank=0, name="test.head")
        hvd.broadcast_parameters(model[2].state_dict(), root_rank=0)
        moved = shared(model, optimizer)
        assert torch.equal(moved, torch.cat((x[:HEAD], head))), f"{compression}"
        assert torch.equal(moved, saved(optimizer, "shared")), f"{compression}"


def check_everything_rewritten_stands_as_it_was_written() -> None:
    """The next forward pass takes place where the user has put the parameters."""
    for compression in SHARING:
        model, optimizer = trained(compression)
        model.load_state_dict(network(seed=4).state_dict())
        x = shared(model, optimizer)
        if hvd.size() > 1:
            assert torch.equal(x, flat(network(seed=4))), f"{compression}"
        assert torch.equal(flat(model), flat(network(seed=4))), f"{compression}"


def check_parameters_broadcast_in_mid_training_become_the_model() -> None:
    if hvd.size() == 1:
        return
    for compression in LOSSY:
        model, optimizer = trained(compression)
        owed = held(optimizer)
        if hvd.rank() == 0:
            model.load_state_dict(network(seed=4).state_dict())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        # A mean of equal numbers may round (LIEC at three ranks).
        close(shared(model, optimizer), flat(network(seed=4)), 1e-7, f"x with {compression}")
        assert torch.equal(held(optimizer), owed)
        train(model, optimizer, 1, lambda t: 0.0, first=5)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # of rank 0's own point: nothing was loaded
        point = flat(model)
        train(model, optimizer, 1, lambda t: 0.0, first=6)
        x = shared(model, optimizer)
        same_everywhere(x, f"x with {compression}")
        close(x, point, 0.2, f"x stays near what was broadcast, {compression}")


def check_what_each_rank_changes_is_part_of_its_update() -> None:
    """One layer or all: x stays, and the virtual iterate moves by the mean of what the ranks have done."""
    if hvd.size() == 1:
        return
    for compression in SHARING:
        for layers in ((0,), (2,), (0, 2)):
            what = f"{compression}, layers {layers}"
            model, optimizer = trained(compression, torch.float64)
            x, y, point = shared(model, optimizer), virtual(model, optimizer), flat(model)
            bound = 0.1 + 0.02 * hvd.rank()
            with torch.no_grad():
                for parameter in (p for layer in layers for p in model[layer].parameters()):
                    parameter.clamp_(-bound, bound)
            change = hvd.allreduce(flat(model) - point, name="test.change")
            assert torch.equal(shared(model, optimizer), x), what
            train(model, optimizer, 1, lambda t: 0.0, first=6)
            close(virtual(model, optimizer), y + change, 1e-12, what)
            same_everywhere(shared(model, optimizer), f"x, {what}")


def check_weights_clipped_after_every_step() -> None:
    """As Wasserstein GANs do, all layers or one: no reason to take one rank's weights for the model."""
    for compression in SHARING:
        for layers in ((2,), (0, 2)):
            model, optimizer = trained(compression)
            for t in range(20):
                train(model, optimizer, 1, lambda t: 0.05, first=t)
                with torch.no_grad():
                    for parameter in (p for layer in layers for p in model[layer].parameters()):
                        parameter.clamp_(-0.1, 0.1)
            x = shared(model, optimizer)
            same_everywhere(x, f"x, {compression}, layers {layers}")
            assert torch.isfinite(x).all()
            assert not torch.equal(x, flat(network()))


if __name__ == "__main__":
    harness.main(globals())
