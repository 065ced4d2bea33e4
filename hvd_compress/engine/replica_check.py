"""The check that the shared model has the same bits on every rank."""

from __future__ import annotations

from typing import Sequence

import torch

from hvd_compress.algorithms.base import State
from hvd_compress.comm.communicator import Communicator
from hvd_compress.digest import digest


def check_replicas(comm: Communicator, states: Sequence[State], step: int) -> None:
    """Raise RuntimeError on every rank unless the shared model has the same bits everywhere (collective).

    Args:
        states: of all buckets; those whose ranks have models of their own are left out.
        step: number of the last step, for the message.
    """
    names, rows = [], []
    for state in states:
        for name, values in zip(state.bucket.layout.names, state.replica()):
            names.append(name)
            rows.append(digest(values))
    if not rows:
        return
    every = comm.allgather(torch.stack(rows).cpu(), "replicas").view(comm.size, -1)
    different = (every != every[0]).any(dim=0).nonzero()
    if different.numel():
        name = names[int(different[0])]
        ranks = (every[:, int(different[0])] != every[0, int(different[0])]).nonzero().flatten().tolist()
        raise RuntimeError(
            f"replicas differ: after step {step} parameter {name!r} of the shared model is not the same on rank 0 and "
            f"on rank(s) {ranks} (seen by rank {comm.rank}). Was a parameter written on some ranks only? Broadcast the "
            "parameters again, or restart from a checkpoint"
        )
