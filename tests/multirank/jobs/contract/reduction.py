"""Sum, Average and Adasum, and the division of gradients before the sum."""

from __future__ import annotations

from typing import Any, Optional

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, DistEF, Identity
from tests.multirank.support.algorithm_cases import BLOCKS, EXACT, LOSSY, exchanges_updates
from tests.multirank.support.assertions import close
from tests.multirank.support.cases import Job, PerJob, cases, name_of, only, several_ranks
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import sgd, shared_model, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


@cases(EXACT, LOSSY)
def check_sum_is_average_times_size(compression: Any) -> None:
    """Training with Sum at lr is training with Average at P * lr, also where updates are exchanged."""

    def trained(op: Any, lr: float) -> torch.Tensor:
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model, momentum=0.9), compression, op=op)
        train(model, optimizer, 20, lambda t: lr)
        return shared_model(model, optimizer)

    close(trained(hvd.Sum, 0.01), trained(hvd.Average, 0.01 * hvd.size()), 1e-9, f"x with {compression}")


SETTINGS: dict[Any, dict[str, float]] = {
    torch.optim.SGD: {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
    torch.optim.AdamW: {"lr": 0.02, "weight_decay": 0.1},
}


def sums(job: Job) -> dict[str, tuple[Any, Any]]:
    """Return classes and algorithms whose sums equal Horovod's: Adam's updates are averaged, not its gradients."""
    return {
        f"{name_of(compression)}, {kind.__name__}": (kind, compression)
        for kind in SETTINGS
        for compression in (EF(Identity()), LIEC(Identity(), 5), DEF(Identity()), DistEF(Identity()))
        if kind is torch.optim.SGD or not exchanges_updates(compression) or job.ranks == 1
    }


@cases(PerJob(sums))
def check_sum_is_horovods_sum(case: tuple[Any, Any]) -> None:
    """With weight decay and with Adam, whose steps are not proportional to the gradient."""
    kind, compression = case
    settings = SETTINGS[kind]
    model, twin = network(torch.float64), network(torch.float64)
    theirs = hvd.DistributedOptimizer(kind(model.parameters(), **settings), model.named_parameters(), op=hvd.Sum)
    train(model, theirs, 20, lambda t: 0.02)
    ours = wrap(twin, kind(twin.parameters(), **settings), compression, op=hvd.Sum)
    train(twin, ours, 20, lambda t: 0.02)
    with ours.consensus():
        close(flat(twin), flat(model), 1e-9, f"x with {compression} and {kind.__name__}")


@cases(EXACT, *BLOCKS)
def check_predivide(compression: Any) -> None:
    results = []
    for factor in (1.0, 4.0):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression, gradient_predivide_factor=factor, groups=2)
        train(model, optimizer, 10, lambda t: 0.1)
        results.append(flat(model))
    close(results[1], results[0], 1e-12, f"parameters with {compression}")


@cases(EXACT, *BLOCKS)
def check_predivide_by_three(compression: Any) -> None:
    results = []
    for factor in (1.0, 3.0):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), compression, gradient_predivide_factor=factor)
        train(model, optimizer, 6, lambda t: 0.05)
        results.append(flat(model))
    close(results[1], results[0], 1e-12, f"parameters with {compression}")


@several_ranks
@cases(groups=(None, 2))
def check_predivide_keeps_sums_in_range(groups: Optional[int]) -> None:
    """Gradients whose sum float16 cannot hold are divided before it, also in groups."""
    for factor, fits in ((1.0, False), (float(hvd.size()), True)):
        model = nn.Linear(4, 3).half()
        optimizer = wrap(model, sgd(model), Dense(), gradient_predivide_factor=factor, groups=groups)
        (model.weight.sum() * 4e4 + model.bias.sum() * 4e4).backward()
        optimizer.synchronize()
        for p in model.parameters():
            assert p.grad is not None
            whole = bool(torch.isfinite(p.grad).all())
            assert whole == fits, f"predivide by {factor}, groups={groups}: {p.grad}"
            if fits:
                close(p.grad, torch.full_like(p.grad, 4e4), 1e-3, "the mean")


# Horovod's Adasum needs MPI where there is no GPU, and a power of two of ranks.
@only(lambda job: job.mpi and job.ranks & (job.ranks - 1) == 0)
def check_adasum_trains() -> None:
    model = network()
    optimizer = wrap(model, sgd(model, lr=0.05, momentum=0.9), Dense(), op=hvd.Adasum)
    before = flat(model)
    train(model, optimizer, 3, lambda t: 0.05)
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)


def check_adasum_is_horovods_own() -> None:
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), Dense(), op=hvd.Adasum)
    assert issubclass(type(optimizer), torch.optim.SGD)
    assert type(optimizer).synchronize.__module__ == "horovod.torch.optimizer"
    assert optimizer._compression is hvd.Compression.none
