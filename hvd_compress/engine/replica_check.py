"""The check that the shared model has the same bits on every rank."""

from __future__ import annotations

from typing import NoReturn, Sequence

import torch
from torch import Tensor

from hvd_compress.algorithms.base import State
from hvd_compress.comm.communicator import Communicator, Sum
from hvd_compress.digest import digest

VARIABLE = "HVD_COMPRESS_CHECK_REPLICAS"


def period(value: str) -> int:
    """Return the number of steps from one check to the next that the environment asks for; 0: no checks.

    Raises:
        ValueError: if ``value`` is neither empty nor an integer >= 0.
    """
    if not (value or "0").isdecimal():
        raise ValueError(
            f"{VARIABLE}={value!r} in the environment is not allowed; it must be an integer >= 0: check "
            "every so many steps, 0: never"
        )
    return int(value or "0")


def check_replicas(comm: Communicator, states: Sequence[State], step: int) -> None:
    """Raise RuntimeError on every rank unless the shared model has the same bits everywhere (collective).

    One allgather of 8 bytes per parameter, after a pass over the model.

    Args:
        states: of all buckets; those whose ranks have models of their own are left out.
        step: number of the last step, for the message.
    """
    found = [pair for state in states for pair in zip(state.bucket.layout.names, state.replica())]
    if not found:
        return
    rows = _on_host([digest(values) for _, values in found])
    every = comm.allgather(rows, "replicas").view(comm.size, -1)
    different = (every != every[0]).any(dim=0).nonzero()
    if different.numel():
        column = int(different[0])
        _raise_for(comm, *found[column], every[:, column].tolist(), step)


def _on_host(digests: Sequence[Tensor]) -> Tensor:
    """Return all digests in the host's memory, which waits once for each device."""
    rows = torch.zeros(len(digests), dtype=torch.int64, device="cpu")
    for device in dict.fromkeys(found.device for found in digests):
        here = [index for index, found in enumerate(digests) if found.device == device]
        rows[here] = torch.stack([digests[index] for index in here]).cpu()
    return rows


def _raise_for(comm: Communicator, name: str, values: Tensor, digests: Sequence[int], step: int) -> NoReturn:
    """Raise the error for the first parameter that differs, with the largest difference from rank 0 (collective)."""
    own = values.to(torch.float64)
    first = comm.allreduce(own.clone() if comm.rank == 0 else torch.zeros_like(own), "replicas.first", Sum)
    apart = float((own - first).abs().max())
    largest = comm.gather_objects(apart, "replicas.apart")
    found = {rank: largest[rank] for rank, other in enumerate(digests) if other != digests[0]}
    listed = ", ".join(f"rank {rank} (by up to {difference:.3g})" for rank, difference in found.items())
    raise RuntimeError(
        f"replicas differ: after step {step} parameter {name!r} of the shared model is not the same on rank 0 and on "
        f"{listed} (seen by rank {comm.rank}). Was a parameter written on some ranks only? Broadcast the parameters "
        "again, or restart from a checkpoint"
    )
