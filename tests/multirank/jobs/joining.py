"""``hvd.join()``: what needs only allreduces goes on as with Horovod's optimizer, all else says so and hangs nobody."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import close, flat, held, network, raises, sgd, train, wrap
from everything import BLOCK, EXACT, LOSSY

from hvd_compress import (
    DEF,
    EF,
    BlockSign,
    CountSketch,
    GlobalSketch,
    LowRank,
    Policy,
    RandomK,
    TopK,
    Warmup,
)

RANKS = (2,)
FULL_RANKS = (3, 4)
MPI_RANKS = (3,)
SKETCH = CountSketch(columns=8, rows=3)
ALL: tuple[Any, ...] = (
    *EXACT,
    *LOSSY,
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
    return 0.05


def check_what_is_summed_goes_on() -> None:
    for compression in ALL:
        if compression.gathers:
            continue
        model = network()
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)
        train(model, optimizer, STEPS, rate)
        before = flat(model)
        train(model, optimizer, 2 * hvd.rank(), rate, first=STEPS)
        hvd.join()
        assert optimizer.stats().steps == STEPS + 2 * hvd.rank(), f"{compression}"
        assert torch.isfinite(flat(model)).all(), f"{compression}"
        assert torch.equal(flat(model), before) == (hvd.rank() == 0), f"{compression}"


def check_data_parallel_training_goes_on_as_with_horovods_optimizer() -> None:
    """Who has joined counts as zeros in a mean over all ranks. No momentum: where updates travel it stays with them."""
    model = network()
    train(model, hvd.DistributedOptimizer(sgd(model), model.named_parameters()), STEPS + 2 * hvd.rank(), rate)
    hvd.join()
    for compression in EXACT:
        if compression.gathers:
            continue
        twin = network()
        train(twin, wrap(twin, sgd(twin), compression), STEPS + 2 * hvd.rank(), rate)
        hvd.join()
        close(flat(twin), flat(model), 1e-6, f"parameters with {compression}")


def check_what_is_gathered_is_a_clear_error() -> None:
    for compression in ALL:
        if not compression.gathers:
            continue
        model = network()
        optimizer = wrap(model, sgd(model, momentum=0.9), compression)
        train(model, optimizer, STEPS, rate)
        if hvd.rank() > 0:
            owed = held(optimizer)
            raises(
                RuntimeError,
                "hvd.join()",
                f"rank {hvd.rank()}",
                "RandomBlock",
                call=lambda m=model, o=optimizer: train(m, o, 1, rate, first=STEPS),
            )
            # Where gradients travel the residual has taken this one in; nothing of it has been sent.
            assert not compression.exchanges_updates or torch.equal(held(optimizer), owed), f"{compression}"
        hvd.join()


if __name__ == "__main__":
    harness.main(globals())
