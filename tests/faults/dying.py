"""A job whose last rank dies in the way and at the place given on the command line."""

from __future__ import annotations

import os
import sys

import horovod.torch as hvd
import torch
from common import loss_of, network, wrap

from hvd_compress import DEF, EF, Dense, RandomBlock

WAY, PLACE, NAME = sys.argv[1:4]
COMPRESSION = {"dense": Dense(), "ef": EF(RandomBlock(density=0.25)), "def": DEF(RandomBlock(density=0.25))}[NAME]


def die() -> None:
    if hvd.rank() != hvd.size() - 1:
        return
    if WAY == "raise":
        raise RuntimeError("this rank gives up")
    os._exit(3)


def main() -> None:
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
        optimizer.step()
    print("trained to the end", flush=True)


main()
