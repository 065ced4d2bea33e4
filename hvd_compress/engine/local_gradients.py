"""Local gradients before the rank's own optimizer steps with them, for algorithms that exchange updates."""

from __future__ import annotations

import math
from typing import Optional, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress.comm.communicator import Communicator, Reduction, Sum, is_elastic
from hvd_compress.engine import sparse


def prepare(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter], comm: Communicator, reduction: Reduction
) -> None:
    """Fill in missing gradients, and with op=Sum multiply all so that the mean of the updates is their sum.

    A gradient that only other ranks have computed counts as zeros here, so that momentum and weight decay go on.
    Multiplied before the local step, a sum is one for momentum and weight decay as well; updates are averaged.
    """
    # SparseAdam knows no dense gradients, and skips what is missing to the same effect.
    if (comm.size > 1 or is_elastic()) and not isinstance(optimizer, torch.optim.SparseAdam):
        for parameter in parameters:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = sparse.missing(parameter, optimizer.state.get(parameter, {}))
    if reduction.op == Sum and comm.size > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(comm.size)


def clip(parameters: Sequence[Parameter], clip_norm: Optional[float], comm: Communicator, reduction: Reduction) -> None:
    """Clip the norm of all gradients to ``clip_norm`` over the square root of the number of ranks; None: do not.

    This is Deep Gradient Compression's local clipping (section 3.2): the sum over ranks then has about norm
    ``clip_norm``.
    """
    if clip_norm is not None:
        factor = comm.size if reduction.op == Sum else 1
        clipped = [_with_dense_gradient(p) for p in parameters]
        torch.nn.utils.clip_grad_norm_(clipped, factor * clip_norm / math.sqrt(comm.size))


def _with_dense_gradient(parameter: Tensor) -> Tensor:
    """Return ``parameter``, or a tensor with the values of its sparse gradient, of which torch takes no norm."""
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()
    values = parameter.grad.values()
    substitute = torch.empty_like(values)
    substitute.grad = values
    return substitute
