"""Sparse gradients: gathered or made dense, summed, scaled, masked, missing on some ranks."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, CountSketch, Dense, GlobalSketch, Identity, RandomBlock, TopK
from tests.multirank.support.algorithm_cases import EXACT, LOSSY, exchanges_updates, is_exact
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, scales_on_cpu
from tests.multirank.support.networks import Embedded, device_type, flat
from tests.multirank.support.training import sgd, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


def run_embedded(compression: Any, skip_on: int = -1, **kwargs: Any) -> tuple[torch.Tensor, Any, float]:
    """Train without gradients on rank ``skip_on``; return x, the last sparse p.grad and the bytes of a step."""
    model = Embedded()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression, **kwargs)
    for t in range(4):
        optimizer.zero_grad()
        if hvd.rank() != skip_on:
            index = torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])
            model(index).square().sum().backward()
        optimizer.step()
    with optimizer.consensus():
        return flat(model), model.table.weight.grad, optimizer.stats().bytes_sent


@cases(compression=(EXACT, LOSSY), skip_on=(-1, 0))
def check_sparse_gradients(compression: Any, skip_on: int) -> None:
    """They are exchanged sparse where gradients are; exact algorithms train as Dense does."""
    expected, _, _ = run_embedded(Dense(), skip_on)
    sent = {}
    for as_dense in (False, True):
        what = f"{compression}, sparse_as_dense={as_dense}, skipped by {skip_on}"
        result, grad, sent[as_dense] = run_embedded(compression, skip_on, sparse_as_dense=as_dense)
        same_everywhere(result, f"x, {what}")
        if not exchanges_updates(compression) and hvd.rank() != skip_on:
            assert grad.is_sparse, what
        if is_exact(compression):
            close(result, expected, 1e-6, what)
    if compression == Dense() and hvd.size() > 1 and skip_on == -1:
        # Two rows of the table's twenty, with their indices, to each other rank; or all of them, summed.
        assert sent[False] < sent[True] / 1.5, sent


@cases((2, 3), (0, 2))
def check_sparse_momentum_where_a_rank_has_no_gradient(skipped: tuple[int, int]) -> None:
    """DEF trains as Dense does, the last rank having no sparse gradient at some steps."""
    results = []
    for compression in (Dense(), DEF(Identity())):
        model = Embedded()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), compression)
        for t in range(5):
            optimizer.zero_grad()
            index = torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])
            skips = hvd.rank() == hvd.size() - 1 and t in skipped
            (model.head(torch.ones(3, 4)) if skips else model(index)).square().sum().backward()
            optimizer.step()
        results.append(flat(model))
        same_everywhere(results[-1], f"parameters with {compression}")
    close(results[1], results[0], 1e-5, f"DEF against Dense, gradient missing at {skipped}")


@cases(
    compression=(
        DEF(TopK(0.25), 0.0, masking=True, clip_norm=0.5),
        GlobalSketch(CountSketch(columns=8, rows=3)),
    ),
    nesterov=(False, True),
)
def check_momentum_of_sparse_gradients_is_masked(compression: Any, nesterov: bool) -> None:
    """It is masked as that of dense ones, also clipped, and under Nesterov momentum, which torch keeps sparse."""
    results = []
    for is_sparse in (False, True):
        model = Embedded()
        model.table.sparse = is_sparse
        plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=nesterov)
        optimizer = wrap(model, plain, compression)
        for t in range(6):
            optimizer.zero_grad()
            model(torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])).square().sum().backward()
            optimizer.step()
        results.append(flat(model))
    assert torch.isfinite(results[0]).all()
    close(results[1], results[0], 1e-5, f"sparse against dense gradients, {compression}, nesterov={nesterov}")


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
    """A gradient that was sparse once is always exchanged sparse, so that ranks agree."""
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


@scales_on_cpu
def check_an_infinity_in_a_sparse_gradient() -> None:
    """The step is skipped on all ranks, as for dense gradients."""
    model = Embedded()
    optimizer: Any = wrap(model, sgd(model), Dense())
    scaler = torch.amp.GradScaler(device_type(), init_scale=1024.0)
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
