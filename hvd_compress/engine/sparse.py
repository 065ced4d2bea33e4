"""Sparse gradients (embeddings with ``sparse=True``) of algorithms that exchange gradients.

Their indices and values are gathered instead of reduced, as Horovod does. Which parameters are sparse shows only
in their first gradients, and a rank may have none: so the ranks agree on it once, at the first exchange.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.comm.communicator import Average, Communicator, Sum


def agree_sparse(comm: Communicator, parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return the parameters that have a sparse gradient on any rank (collective, one int32 per parameter)."""
    own = [int(p.grad is not None and p.grad.is_sparse) for p in parameters]
    if not parameters:
        return []
    flags = comm.allreduce(torch.tensor(own, dtype=torch.int32, device="cpu"), "sparse", Sum).tolist()
    return [p for p, flag in zip(parameters, flags) if flag]


def empty_gradient(parameter: Parameter) -> Tensor:
    """Return a sparse gradient without any entry."""
    return torch.sparse_coo_tensor(
        torch.zeros((1, 0), dtype=torch.int64, device=parameter.device),
        parameter.new_zeros((0, *parameter.shape[1:])),
        parameter.shape,
    )


def missing(parameter: Parameter, optimizer_state: Mapping[str, Any]) -> Tensor:
    """Return a gradient of zeros that the wrapped optimizer can take: dense ones are not added to a sparse momentum."""
    if any(isinstance(value, Tensor) and value.is_sparse for value in optimizer_state.values()):
        return empty_gradient(parameter)
    return torch.zeros_like(parameter)


def launch(
    comm: Communicator, parameters: Sequence[Parameter], names: Sequence[str], op: int
) -> list[Callable[[], Tensor]]:
    """Start to gather sparse gradients; a missing one counts as empty, a dense one is converted."""
    waits = []
    for parameter, name in zip(parameters, names):
        gradient = parameter.grad
        if gradient is None:
            gradient = empty_gradient(parameter)
        elif not gradient.is_sparse:
            gradient = gradient.to_sparse(1)
        waits.append(start_sum(comm, gradient, f"sparse.{name}", op))
    return waits


def start_sum(comm: Communicator, gradient: Tensor, name: str, op: int) -> Callable[[], Tensor]:
    """Start to sum or average a sparse COO tensor over ranks, by allgathers; call the result to wait for the aggregate.

    The aggregate has the same bits on every rank. Waiting raises RuntimeError on every rank if an index that a rank
    has sent is outside the tensor.
    """
    if comm.size == 1:
        return lambda: gradient
    gradient = gradient.coalesce()
    places = comm.allgather_async(gradient.indices().t().contiguous(), f"{name}.indices")
    entries = comm.allgather_async(gradient.values(), f"{name}.values")

    def wait() -> Tensor:
        values, indices = entries.wait(), places.wait()
        _require_places(comm, name, gradient, indices, len(values))
        total = values / comm.size if op == Average else values
        # Adding duplicates is not deterministic on an accelerator: sum them here, so that all ranks agree.
        return torch.sparse_coo_tensor(indices.t(), total, gradient.shape, check_invariants=False).coalesce()

    return wait


def _require_places(comm: Communicator, name: str, gradient: Tensor, indices: Tensor, count: int) -> None:
    """Raise RuntimeError unless there are ``count`` received indices, all within the tensor.

    All ranks have received the same bytes, so either none or all of them raise, and have the time to find the sender.
    """
    sizes = torch.tensor(gradient.shape[: gradient.sparse_dim()], device="cpu").to(indices.device)
    outside = ((indices < 0) | (indices >= sizes)).any(dim=1)
    if len(indices) == count and not bool(outside.any()):
        return
    sent: list[tuple[int, int]] = comm.gather_objects((gradient.indices().shape[1], len(gradient.values())), name)
    found = [f"rank {rank} has sent {own} indices, {numel} values" for rank, (own, numel) in enumerate(sent)]
    if len(indices) == count:
        row = int(outside.nonzero()[0])
        sender = sum(end <= row for end in itertools.accumulate(own for own, _ in sent))
        found = [f"rank {sender} has sent the index {indices[row].tolist()}"]
    raise RuntimeError(
        f"corrupted sparse gradient {name!r} of shape {tuple(gradient.shape)}: {'; '.join(found)} (seen by rank "
        f"{comm.rank}). Nothing was applied"
    )
