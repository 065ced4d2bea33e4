"""The cases of the step-time benchmark: parameters and optimizer of each method, and a cheap but real backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch

from benchmarks.models import Shape, numel

LOCAL = "local"  # the unwrapped optimizer, to which the overhead of every method is relative
METHODS = ("horovod", "horovod-fp16", "dense", "ef", "def")
COMPRESSED = ("ef", "def")
DENSITY = 1 / 64
_LEARNING_RATE = 1e-4


class _Emit(torch.autograd.Function):
    """Function whose backward gives a parameter the gradient ``value * factor``, in a fresh tensor as networks do."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.value, ctx.factor = value, factor
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.mul(ctx.value, ctx.factor), None, None


@dataclass
class Case:
    """One method with parameters of its own, so that methods share neither hooks nor residuals."""

    method: str
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients: list[torch.Tensor]
    steps: int = 0

    def forward(self) -> list[torch.Tensor]:
        """Return one scalar per parameter; backward() of them produces the gradients, last parameter first."""
        self.steps += 1
        factor = 1.0 + 0.1 * (self.steps % 7)
        emit: Callable[..., torch.Tensor] = _Emit.apply
        return [emit(parameter, value, factor) for parameter, value in zip(self.parameters, self.gradients)]

    def stats(self) -> Any:
        """Return the optimizer's own figures, or None if it has none (Horovod, local)."""
        return self.optimizer.stats() if hasattr(self.optimizer, "stats") else None


def make_gradients(shapes: list[Shape], rank: int) -> list[torch.Tensor]:
    """Return fixed gradients that differ between ranks; every case may share them."""
    generator = torch.Generator().manual_seed(1000 + rank)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make_case(method: str, shapes: list[Shape], gradients: list[torch.Tensor]) -> Case:
    """Build a method's parameters (equal on all ranks) and optimizer: SGD with momentum 0.9."""
    parameters = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in shapes]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=_LEARNING_RATE, momentum=0.9)
    # Horovod requires that a name keeps its dtype and shape, so every method has names of its own.
    named = [(f"{method}.{index}", parameter) for index, parameter in enumerate(parameters)]
    if method == "horovod":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named)
    elif method == "horovod-fp16":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=hvd.Compression.fp16)
    elif method != LOCAL:
        optimizer = _ours(method, optimizer, named)
    return Case(method, parameters, optimizer, gradients)


def expected_bytes(method: str, shapes: list[Shape], ranks: int) -> float:
    """Return what a rank sends per step by the ring's formula, 2 (P-1)/P times the payload."""
    payload = {LOCAL: 0.0, "horovod-fp16": 2.0, "ef": 4 * DENSITY, "def": 4 * DENSITY}.get(method, 4.0)
    return 2 * (ranks - 1) / ranks * payload * numel(shapes)


def _ours(
    method: str, optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    import hvd_compress  # imported here, so that Horovod itself can be measured without it

    block = hvd_compress.RandomBlock(density=DENSITY)
    algorithms: dict[str, Callable[[], Any]] = {
        "dense": hvd_compress.Dense,
        "ef": lambda: hvd_compress.EF(block),
        "def": lambda: hvd_compress.DEF(block, coefficient=0.3),
    }
    if method not in algorithms:
        raise ValueError(f"method must be one of {(LOCAL, *METHODS)}, got {method!r}")
    algorithm = algorithms[method]()
    wrapped: torch.optim.Optimizer = hvd_compress.DistributedOptimizer(optimizer, named, algorithm)
    return wrapped
