"""This rank's gradients before its own optimizer steps with them, for algorithms that exchange updates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvd_compress.comm.communicator import Sum, is_elastic
from hvd_compress.engine import sparse
from hvd_compress.engine.reducer import Reducer


def prepare(optimizer: torch.optim.Optimizer, reducer: Reducer) -> None:
    """Complete them, and with op=Sum make them this rank's share of a mean.

    A gradient that only other ranks have computed counts as zeros here, so that momentum and weight decay go on.
    Multiplied before the local step, a sum is one for momentum and weight decay as well; updates are averaged.
    """
    comm = reducer.comm
    # SparseAdam knows no dense gradients, and skips what is missing to the same effect.
    if (comm.size > 1 or is_elastic()) and not isinstance(optimizer, torch.optim.SparseAdam):
        for parameter in reducer.tracked:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = sparse.missing(parameter, optimizer.state.get(parameter, {}))
    if reducer.reduction.op == Sum and comm.size > 1:
        for parameter in reducer.tracked:
            if parameter.grad is not None:
                parameter.grad.mul_(comm.size)


def clip(reducer: Reducer) -> None:
    """Clip their norm to the algorithm's ``clip_norm`` over the square root of the number of ranks, if it has one."""
    if (norm := reducer.algorithm.clip_norm) is not None:
        factor = reducer.comm.size if reducer.reduction.op == Sum else 1
        clipped = [_with_dense_gradient(p) for p in reducer.tracked]
        torch.nn.utils.clip_grad_norm_(clipped, factor * norm / math.sqrt(reducer.comm.size))


def _with_dense_gradient(parameter: Tensor) -> Tensor:
    """``parameter``, or where its gradient is sparse, of which torch takes no norm, one that has its values."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()
    values = parameter.grad.values()
    stand_in = torch.empty_like(values)
    stand_in.grad = values
    return stand_in
