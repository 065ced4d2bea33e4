"""Equal bits: in repeated runs, whatever the buckets, and on all ranks, which the check of replicas watches."""

from __future__ import annotations

import os
from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, Cast, Dense, Identity, RandomBlock
from tests.multirank.support.algorithm_cases import BLOCK, exchanges_updates
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import FULL, cases, several_ranks
from tests.multirank.support.internals import shared_parameter
from tests.multirank.support.networks import flat
from tests.multirank.support.training import harmonic_rate, make, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


def trained(compression: object) -> torch.Tensor:
    """Return the parameters after a run with six buckets, whose collectives overlap."""
    torch.manual_seed(0)
    parameters = nn.ParameterList([nn.Parameter(torch.randn(3000)) for _ in range(12)])
    optimizer = wrap(parameters, torch.optim.SGD(parameters.parameters(), lr=0.1, momentum=0.9), compression, groups=6)
    for t in range(25):
        optimizer.zero_grad()
        # The order changes from step to step, and with it which buckets are ready in one cycle of Horovod.
        for k, p in enumerate(parameters if t % 2 else reversed(list(parameters))):
            ((p - torch.sin(torch.arange(3000.0) * (hvd.rank() + 1) + k)) ** 2).sum().backward()
        optimizer.step()
    return flat(parameters)


@cases(Dense(), EF(RandomBlock(density=0.3)), DEF(RandomBlock(density=0.3)))
def check_runs_repeat_bitwise(compression: Any) -> None:
    first = trained(compression)
    for _ in range(4 if FULL else 2):
        assert torch.equal(trained(compression), first), f"{compression} depends on timing"
    if not isinstance(compression, DEF):
        same_everywhere(first, "parameters")


@cases(Dense(), EF(RandomBlock(density=0.3)), EF(Identity()), EF(Cast()))
def check_buckets_change_nothing(compression: Any) -> None:
    """Many buckets, each scaled by a power of two for its exchange, give the result of one."""
    results = []
    for groups in (None, 12):
        torch.manual_seed(0)
        parameters = nn.ParameterList([nn.Parameter(torch.randn(50)) for _ in range(12)])
        plain = torch.optim.SGD(parameters.parameters(), lr=0.1, momentum=0.9)
        optimizer = wrap(parameters, plain, compression, groups=groups)
        for t in range(6):
            optimizer.zero_grad(set_to_none=t % 2 == 0)
            sum(((p - hvd.rank() - k) ** 2).sum() for k, p in enumerate(parameters)).backward()
            optimizer.step()
        results.append(flat(parameters))
    tolerance = 1e-3 if compression == EF(Cast()) else 1e-6  # float16 sums depend on how an allreduce cuts them
    close(results[1], results[0], tolerance, f"parameters with {compression}")


def make_watched(compression: Any, **settings: Any) -> tuple[Any, Any]:
    """Return a network and an optimizer that checks replicas."""
    os.environ["HVD_COMPRESS_CHECK_REPLICAS"] = "1"
    try:
        return make(compression, **settings)
    finally:
        del os.environ["HVD_COMPRESS_CHECK_REPLICAS"]


def change_the_last(v: torch.Tensor) -> None:
    """Change the last element a little."""
    v[-1, -1] += 1e-6


def swap_two(v: torch.Tensor) -> None:
    """Swap two elements, which leaves their sum."""
    v[0, 0], v[2, 3] = v[2, 3].clone(), v[0, 0].clone()


@several_ranks
@cases(compression=(Dense(), EF(BLOCK), DEF(BLOCK)), spoil=(change_the_last, swap_two))
def check_replicas_that_differ_anywhere_are_found(compression: Any, spoil: Callable[[torch.Tensor], None]) -> None:
    model, optimizer = make_watched(compression, lr=0.1, momentum=0.0)
    train(model, optimizer, 2, lambda t: 0.1)
    x = shared_parameter(optimizer, "2.weight") if exchanges_updates(compression) else model[2].weight.data
    if hvd.rank() == hvd.size() - 1:
        spoil(x)
    raises(
        RuntimeError,
        "replicas differ",
        "2.weight",
        call=lambda: train(model, optimizer, 1, lambda t: 0.0, first=2),
    )


def check_replica_check_stops_every_rank() -> None:
    model, optimizer = make_watched(DEF(BLOCK))
    assert optimizer.check_replicas
    train(model, optimizer, 3, harmonic_rate)
    if hvd.size() == 1:
        return
    if hvd.rank() == hvd.size() - 1:
        shared_parameter(optimizer, "2.weight")[0, 0] += 1e-6
    raises(
        RuntimeError,
        "replicas differ",
        "'2.weight'",
        f"rank {hvd.size() - 1} (by up to ",
        call=lambda: train(model, optimizer, 1, harmonic_rate, first=3),
    )


@several_ranks
@cases(EF(BLOCK), DEF(BLOCK))
def check_replicas_are_compared_every_so_many_steps(compression: Any) -> None:
    model, optimizer = make(compression)
    optimizer.check_replicas = 3
    train(model, optimizer, 3, harmonic_rate)
    x = shared_parameter(optimizer, "2.weight") if exchanges_updates(compression) else model[2].weight.data
    if hvd.rank() == 1:
        x[0, 0] += 0.5
    train(model, optimizer, 2, lambda t: 0.0, first=3)
    raises(
        RuntimeError,
        "after step 6 parameter '2.weight'",
        "rank 1 (by up to 0.5)",
        call=lambda: train(model, optimizer, 1, lambda t: 0.0, first=5),
    )
