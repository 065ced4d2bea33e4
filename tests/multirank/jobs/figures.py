"""Figures to the last digit: bytes, norms, the check of replicas, what dtypes hold."""

from __future__ import annotations

import math
import os
from typing import Any

import harness
import horovod.torch as hvd
import reference
import torch
from common import flat, network, raises, sgd, train, wrap
from torch import nn

from hvd_compress import DEF, EF, Dense, DistEF, RandomBlock, TopK

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
BLOCK = RandomBlock(density=0.25)


def ring() -> float:
    """Times what it is given a ring-allreduce sends."""
    return 2 * (hvd.size() - 1) / hvd.size()


def check_bytes_of_a_step() -> None:
    d = flat(network()).numel()
    blocks = sum(max(1, int(p.numel() * 0.25)) for p in network().parameters())
    k = d // 4
    for compression, expected in (
        (Dense(), ring() * 8 * d),
        (EF(BLOCK), ring() * 8 * blocks),
        # float64 values and int32 places; a float32 that calls the roll
        (EF(TopK(0.25)), (hvd.size() - 1) * -(-12 * k // 8) * 8 + ring() * 4),
    ):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 3, lambda t: 0.1)
        stats = optimizer.stats()
        # At 3 ranks a rank's share is no whole number of bytes.
        assert math.isclose(stats.bytes_sent, expected), f"{compression}: {stats.bytes_sent} bytes, not {expected}"
        assert stats.total_bytes_sent >= 2.999 * expected
        assert math.isclose(stats.dense_bytes, ring() * 8 * d)
        assert hvd.size() == 1 or stats.wait_seconds > 0, "somebody waited"
    model = network(torch.float64)
    optimizer = wrap(model, sgd(model), DistEF())
    train(model, optimizer, 3, lambda t: 0.1)
    exchange, me = optimizer._reducer.states[0]._exchange, hvd.rank()
    up, down = exchange._sent.lengths, exchange._answers.lengths
    watch = 1 + len(list(model.parameters()))  # float32: who is here, who saw a parameter rewritten
    expected = sum(up) - up[me] + (hvd.size() - 1) * down[me] + ring() * 4 * watch
    assert math.isclose(optimizer.stats().bytes_sent, expected), f"{optimizer.stats().bytes_sent} bytes, not {expected}"


def check_the_norm_of_what_is_held_back() -> None:
    for groups in (None, 4):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), EF(BLOCK), groups=groups)
        train(model, optimizer, 9, lambda t: 0.1 if t < 5 else 0.07)
        ours = optimizer.state_dict()["hvd_compress"]
        residual = [ours["buffers"]["residual"][n].reshape(-1) / ours["scalars"][n]["unit"] for n in reference.SHAPES]
        assert abs(optimizer.stats().residual_norm - float(torch.cat(residual).norm())) < 1e-12


def check_replicas_that_differ_anywhere_are_found() -> None:
    if hvd.size() == 1:
        return

    def last(v: torch.Tensor) -> None:
        v[-1, -1] += 1e-6

    def exchanged(v: torch.Tensor) -> None:
        v[0, 0], v[2, 3] = v[2, 3].clone(), v[0, 0].clone()

    for compression in (Dense(), EF(BLOCK), DEF(BLOCK)):
        for spoil in (last, exchanged):
            os.environ["HVD_COMPRESS_CHECK_REPLICAS"] = "1"
            model = network()
            optimizer = wrap(model, sgd(model), compression)
            del os.environ["HVD_COMPRESS_CHECK_REPLICAS"]
            train(model, optimizer, 2, lambda t: 0.1)
            x: Any = model[2].weight.data
            if compression.exchanges_updates:
                x = optimizer.state_dict()["hvd_compress"]["buffers"]["shared"]["2.weight"]
            if hvd.rank() == hvd.size() - 1:
                spoil(x)
            raises(
                RuntimeError,
                "replicas differ",
                "2.weight",
                call=lambda m=model, o=optimizer: train(m, o, 1, lambda t: 0.0, first=2),
            )


def check_bfloat16_gradients_beyond_float16() -> None:
    model = nn.Linear(4, 3).bfloat16()
    optimizer = wrap(model, sgd(model), Dense())
    (model.weight.sum() * 1e5 + model.bias.sum() * 1e5).backward()
    optimizer.synchronize()
    assert all(p.grad is not None and bool((p.grad == torch.tensor(1e5).bfloat16()).all()) for p in model.parameters())


if __name__ == "__main__":
    harness.main(globals())
