"""Sparse gradients that are summed, scaled, become dense, or are missing where an optimizer knows no dense ones."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import Embedded, close, flat, same_everywhere, sgd, wrap
from torch import nn

from hvd_compress import DEF, Dense, RandomBlock

RANKS = (2,)
FULL_RANKS = (3,)


def check_a_sum_of_sparse_gradients() -> None:
    results = []
    for as_dense in (False, True):
        model = Embedded()
        optimizer = wrap(model, sgd(model), Dense(), op=hvd.Sum, sparse_as_dense=as_dense)
        for t in range(3):
            optimizer.zero_grad()
            model(torch.tensor([3 * hvd.rank() + t, 1, 1])).square().sum().backward()
            optimizer.step()
        results.append(flat(model))
    close(results[0], results[1], 1e-6, "sparse against dense, summed")


def check_gradients_that_become_dense() -> None:
    """Once sparse on the payload, always: ranks may not change their minds apart."""
    model = Embedded()
    optimizer = wrap(model, sgd(model), Dense())
    for t in range(4):
        optimizer.zero_grad()
        loss = model(torch.tensor([1, 2 + hvd.rank()])).square().sum()
        if t >= 2:
            loss = model.table.weight.square().sum() + model.head.weight.sum() + model.head.bias.sum()
        loss.backward()
        optimizer.step()
    same_everywhere(flat(model), "sparse, then dense")


def check_sparse_adam_without_a_gradient_on_one_rank() -> None:
    table = nn.Embedding(20, 4, sparse=True)
    hvd.broadcast_parameters(table.state_dict(), root_rank=0)
    optimizer = wrap(table, torch.optim.SparseAdam(list(table.parameters())), DEF(RandomBlock(0.25)))
    for t in range(3):
        optimizer.zero_grad()
        if (hvd.rank(), t) != (hvd.size() - 1, 1):
            table(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
    with optimizer.consensus():
        same_everywhere(flat(table), "x with SparseAdam")


def check_an_infinity_in_a_sparse_gradient() -> None:
    """The step is left out on all ranks, as for dense ones."""
    model = Embedded()
    optimizer: Any = wrap(model, sgd(model), Dense())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(model(torch.tensor([1, 2])).square().sum()).backward()
        if (hvd.rank(), t) == (hvd.size() - 1, 1):
            values = torch.full((1, 4), float("inf"))
            model.table.weight.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), values, (20, 4))
        before = flat(model)
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, flat(model)) == (t == 1), f"step {t}"
        assert bool(flat(model).isfinite().all())
    same_everywhere(flat(model), "after an infinity")


if __name__ == "__main__":
    harness.main(globals())
