"""Sparse gradients (embeddings with ``sparse=True``) of algorithms that exchange gradients.

Horovod gathers their indices and values instead of reducing them. Which parameters are sparse shows only
in their first gradients, and a rank may have none: so the ranks agree on it once, at the first exchange.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.comm.communicator import Communicator, Sum


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
        waits.append(comm.sparse_allreduce_async(gradient, f"sparse.{name}", op))
    return waits
