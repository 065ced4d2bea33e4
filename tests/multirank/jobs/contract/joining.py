"""``hvd.join()``: algorithms of allreduces only continue as Horovod's optimizer does, all others raise an error."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, BlockSign, CountSketch, GlobalSketch, LowRank, Policy, RandomK, TopK, Warmup
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, allreduces_only, exchanges_updates
from tests.multirank.support.assertions import close, raises
from tests.multirank.support.cases import cases, without_mpi
from tests.multirank.support.internals import residuals
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import sgd, train, wrap

RANKS = (2,)
FULL_RANKS = (3, 4)
MPI_RANKS = (3,)
SKETCH = CountSketch(columns=8, rows=3)
ALGORITHMS: tuple[Any, ...] = (
    EXACT,
    LOSSY,
    EF(LowRank(1)),
    DEF(LowRank(1)),
    EF(RandomK(0.25)),
    DEF(BLOCK, "auto"),
    EF(TopK(0.25)),
    DEF(BlockSign()),
    GlobalSketch(SKETCH),
    GlobalSketch(SKETCH, "allgather"),
    DEF(Warmup(BLOCK, (1.0,), 2)),
    EF(Warmup(TopK(0.1), (1.0,), 2)),
    Policy(EF(BLOCK), patterns={"2.*": EF(TopK(0.25))}),
)
STEPS = 3


def rate(t: int) -> float:
    """Return the learning rate."""
    return 0.05


@cases(*ALGORITHMS, where=allreduces_only)
def check_algorithms_of_allreduces_continue(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model, momentum=0.9), compression)
    train(model, optimizer, STEPS, rate)
    before = flat(model)
    train(model, optimizer, 2 * hvd.rank(), rate, first=STEPS)
    hvd.join()
    assert optimizer.stats().steps == STEPS + 2 * hvd.rank(), f"{compression}"
    assert torch.isfinite(flat(model)).all(), f"{compression}"
    assert torch.equal(flat(model), before) == (hvd.rank() == 0), f"{compression}"


@without_mpi
@cases(EXACT, where=allreduces_only)
def check_exact_algorithms_train_as_horovods_optimizer(compression: Any) -> None:
    """Ranks that have joined count as zeros in a mean over all ranks.

    There is no momentum: where updates are exchanged, that of ranks that have joined would be missing.
    """
    model, twin = network(), network()
    train(model, hvd.DistributedOptimizer(sgd(model), model.named_parameters()), STEPS + 2 * hvd.rank(), rate)
    hvd.join()
    train(twin, wrap(twin, sgd(twin), compression), STEPS + 2 * hvd.rank(), rate)
    hvd.join()
    close(flat(twin), flat(model), 1e-6, f"parameters with {compression}")


@cases(*ALGORITHMS, where=lambda c: not allreduces_only(c))
def check_all_other_algorithms_raise_an_error(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model, momentum=0.9), compression)
    train(model, optimizer, STEPS, rate)
    if hvd.rank() > 0:
        before = residuals(optimizer)
        raises(
            RuntimeError,
            "hvd.join()",
            f"rank {hvd.rank()}",
            "RandomBlock",
            call=lambda: train(model, optimizer, 1, rate, first=STEPS),
        )
        # Where gradients are exchanged the residual has accumulated this one; nothing of it has been sent.
        assert not exchanges_updates(compression) or torch.equal(residuals(optimizer), before), f"{compression}"
    hvd.join()
