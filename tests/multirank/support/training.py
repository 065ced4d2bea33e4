"""Training as users do it, and the points that a step is about: the shared model and the virtual iterate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import horovod.torch as hvd
import torch
from torch import Tensor, nn

import hvd_compress
from tests.multirank.support.networks import flat, loss_of, network


def sgd(model: nn.Module, lr: float = 0.1, **kwargs: Any) -> torch.optim.SGD:
    """Return torch's SGD of the model's parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr, **kwargs)


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, compression: Any, **kwargs: Any) -> Any:
    """Wrap an optimizer in our DistributedOptimizer, with the model's names of parameters."""
    return hvd_compress.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression, **kwargs
    )


def make(compression: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    """Return the reference's network and our optimizer around SGD with momentum, whose arguments are ``kwargs``."""
    model = network(dtype, seed)
    return model, wrap(model, sgd(model, **{"lr": 0.05, "momentum": 0.9, **kwargs}), compression)


def harmonic_rate(t: int) -> float:
    """Return 0.05, after 7 steps a half of it, after 14 steps a third."""
    return 0.05 / (1 + t // 7)


def dropping_rate(t: int) -> float:
    """Return 0.05, after 5 steps a fifth of it."""
    return 0.05 if t < 5 else 0.01


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    schedule: Callable[[int], float],
    first: int = 0,
    after_step: Callable[[int], None] = lambda t: None,
) -> None:
    """Train on this rank's data with a learning rate per step; ``first`` is the number of the first step."""
    for t in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(t)
        take_step(model, optimizer, t)
        after_step(t)


def take_step(model: nn.Module, optimizer: Any, t: int) -> None:
    """Take step ``t`` on this rank's data, at the learning rates that are set."""
    optimizer.zero_grad()
    loss_of(model, hvd.rank(), t).backward()
    optimizer.step()


def mean_gradients(model: nn.Module, steps: tuple[int, ...] = (0,)) -> list[Tensor]:
    """Return the mean over ranks of the summed gradients of some batches (collective).

    They are computed with a copy of the model: its own p.grad belongs to the exchange.
    """
    twin = network(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    for t in steps:
        loss_of(twin, hvd.rank(), t).backward()
    return [hvd.allreduce(p.grad, name=f"test.plain.{n}") for n, p in twin.named_parameters()]


def mean_gradient(model: nn.Module, *steps: int) -> Tensor:
    """Return ``mean_gradients`` as one vector."""
    return torch.cat([gradient.reshape(-1) for gradient in mean_gradients(model, steps)])


def local_gradient(model: nn.Module) -> Tensor:
    """Return this rank's p.grad of all parameters as one vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


_LEFT: dict[tuple[int, ...], Any] = {}


@contextmanager
def process_set(ranks: list[int]) -> Iterator[Any]:
    """Add a process set and remove it after the block (collective).

    After a failure it is left to the next case: a removal would wait for ranks that did not fail.
    """
    key = tuple(ranks)
    some = _LEFT[key] if key in _LEFT else hvd.add_process_set(ranks)
    _LEFT[key] = some
    yield some
    del _LEFT[key]
    hvd.remove_process_set(some)


def shared_model(model: nn.Module, optimizer: Any) -> Tensor:
    """Return the shared model x as one vector (collective)."""
    with optimizer.consensus():
        return flat(model)


def virtual_iterate(model: nn.Module, optimizer: Any) -> Tensor:
    """Return the virtual iterate y as one vector (collective)."""
    with optimizer.consensus("virtual"):
        return flat(model)
