"""A job whose last rank dies: in backward, before the step, or in it when the first payloads have been launched.

Arguments: the way ("raise" or "exit"), the place ("backward", "step" or "exchange") and the algorithm.
"""

from __future__ import annotations

import os
import sys

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, CountSketch, Dense, DistEF, GlobalSketch, GlobalTopK, RandomBlock, TopK
from tests.multirank.support.internals import first_bucket_state
from tests.multirank.support.networks import loss_of, network
from tests.multirank.support.training import wrap

WAY, PLACE, NAME = sys.argv[1:4]
COMPRESSION = {
    "dense": Dense(),
    "ef": EF(RandomBlock(density=0.25)),
    "def": DEF(RandomBlock(density=0.25)),
    "allgather": EF(TopK(0.25)),
    "alltoall": DistEF(),
    "merges": GlobalTopK(0.1),
    "tree": GlobalSketch(CountSketch(columns=8, rows=3), "tree"),
}[NAME]


def die() -> None:
    """End the last rank."""
    if hvd.rank() != hvd.size() - 1:
        return
    print("this rank gives up", flush=True)
    if WAY == "raise":
        raise RuntimeError
    os._exit(3)


def main() -> None:
    """Train for ten steps, if no rank dies."""
    hvd.init()
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), COMPRESSION)
    for t in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), t)
        if t == 5 and PLACE == "backward":
            die()
        loss.backward()
        if t == 5 and PLACE == "step":
            die()
        if t == 5 and PLACE == "exchange" and hvd.rank() == hvd.size() - 1:
            first_bucket_state(optimizer).next_round = die
        optimizer.step()
    print("trained to the end", flush=True)


main()
