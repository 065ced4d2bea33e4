"""The figures of ``stats()`` to the last digit."""

from __future__ import annotations

import math
from typing import Any, Optional

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, Dense, DistEF, Identity, TopK
from tests.multirank.support.algorithm_cases import BLOCK, BLOCKS
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import message_lengths, residual
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import sgd, train, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


def ring() -> float:
    """Return how many times its payload a rank sends in a ring-allreduce."""
    return 2 * (hvd.size() - 1) / hvd.size()


@cases(Dense(), EF(BLOCK), EF(TopK(0.25)))
def check_bytes_of_a_step(compression: Any) -> None:
    d = flat(network()).numel()
    blocks = sum(max(1, int(p.numel() * 0.25)) for p in network().parameters())
    k = d // 4
    expected = {
        Dense(): ring() * 8 * d,
        EF(BLOCK): ring() * 8 * blocks,
        EF(TopK(0.25)): (hvd.size() - 1) * -(-12 * k // 8) * 8,  # float64 values and int32 indices
    }[compression]
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), compression)
    train(model, optimizer, 3, lambda t: 0.1)
    stats = optimizer.stats()
    # At 3 ranks a rank's share is no whole number of bytes.
    assert math.isclose(stats.bytes_sent, expected), f"{compression}: {stats.bytes_sent} bytes, not {expected}"
    assert stats.total_bytes_sent >= 2.999 * expected
    assert math.isclose(stats.dense_bytes, ring() * 8 * d)
    assert hvd.size() == 1 or stats.wait_seconds > 0, "no time of waiting"


def check_bytes_of_dist_ef() -> None:
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), DistEF())
    train(model, optimizer, 3, lambda t: 0.1)
    up, down = message_lengths(optimizer)
    me = hvd.rank()
    expected = sum(up) - up[me] + (hvd.size() - 1) * down[me]
    assert math.isclose(optimizer.stats().bytes_sent, expected), f"{optimizer.stats().bytes_sent} bytes, not {expected}"


@cases(Dense(), EF(Identity()), DEF(Identity()), *BLOCKS)
def check_first_step_counts_its_exchange_only(compression: Any) -> None:
    model = network()
    optimizer = wrap(model, sgd(model), compression)
    sent: list[float] = []
    train(model, optimizer, 3, lambda t: 0.1, after_step=lambda t: sent.append(optimizer.stats().bytes_sent))
    assert max(sent) - min(sent) < 1e-6, f"{sent} with {compression}"
    if hvd.size() > 1:
        assert optimizer.stats().total_bytes_sent > sum(sent), "the total has the handshake and the checks as well"


@cases(groups=(None, 4))
def check_the_norm_of_the_residual(groups: Optional[int]) -> None:
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), EF(BLOCK), groups=groups)
    train(model, optimizer, 9, lambda t: 0.1 if t < 5 else 0.07)
    assert abs(optimizer.stats().residual_norm - float(residual(optimizer).norm())) < 1e-12
