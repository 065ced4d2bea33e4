"""What job files share: the reference's network in torch, and comparisons across ranks."""

from __future__ import annotations

import io
from typing import Any, Callable

import horovod.torch as hvd
import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn

import hvd_compress


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """The reference's model with the reference's initial parameters."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for name, value in reference.initial(seed).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """The reference's loss on the data of ``rank`` at ``step``."""
    dtype = next(model.parameters()).dtype
    inputs, targets = (torch.from_numpy(a).to(dtype) for a in reference.batch(rank, step))
    return ((model(inputs) - targets) ** 2).mean()


def sgd(model: nn.Module, lr: float = 0.1, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **kwargs)


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, compression: Any, **kwargs: Any) -> Any:
    """Our DistributedOptimizer with the model's names."""
    return hvd_compress.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=compression, **kwargs
    )


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    schedule: Callable[[int], float],
    first: int = 0,
    after_step: Callable[[int], None] = lambda t: None,
) -> None:
    """Train on this rank's data with a learning rate per step."""
    for t in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(t)
        take_step(model, optimizer, t)
        after_step(t)


def take_step(model: nn.Module, optimizer: Any, t: int) -> None:
    """One step on this rank's data, at the rates that are set."""
    optimizer.zero_grad()
    loss_of(model, hvd.rank(), t).backward()
    optimizer.step()


def mean_gradients(model: nn.Module, steps: tuple[int, ...] = (0,)) -> list[Tensor]:
    """Mean over ranks of the summed gradients of some batches, by a twin: p.grad belongs to the exchange."""
    twin = network(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    for t in steps:
        loss_of(twin, hvd.rank(), t).backward()
    return [hvd.allreduce(p.grad, name=f"test.plain.{n}") for n, p in twin.named_parameters()]


def mean_gradient(model: nn.Module, *steps: int) -> Tensor:
    """``mean_gradients`` as one vector."""
    return torch.cat([gradient.reshape(-1) for gradient in mean_gradients(model, steps)])


def shared(model: nn.Module, optimizer: Any) -> Tensor:
    """The shared model x (collective)."""
    with optimizer.consensus():
        return flat(model)


def virtual(model: nn.Module, optimizer: Any) -> Tensor:
    """The virtual iterate y (collective)."""
    with optimizer.consensus("virtual"):
        return flat(model)


class Embedded(nn.Module):
    """An embedding with sparse gradients and a dense layer, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(index))
        return out


def flat(model: nn.Module) -> Tensor:
    """All parameters as one new vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def same_everywhere(vector: Tensor, what: str) -> None:
    """Fail unless every rank has the same bits."""
    every = hvd.allgather(vector.reshape(1, -1), name=f"test.same.{what}")
    for rank in range(hvd.size()):
        assert torch.equal(every[rank], every[0]), f"{what} differs between rank 0 and rank {rank}"


def close(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Fail unless ``actual`` equals ``expected`` up to ``tolerance``, relative to the norm of the latter."""
    wanted = expected if isinstance(expected, Tensor) else torch.from_numpy(np.asarray(expected))
    difference = torch.linalg.vector_norm(actual.double() - wanted.double())
    error = float(difference / torch.linalg.vector_norm(wanted.double()).clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:g} (rank {hvd.rank()})"


def joined(tensors: reference.Tensors) -> np.ndarray[Any, Any]:
    """A reference's tensors as one vector, in the order of the model's parameters."""
    return np.concatenate([tensors[name].reshape(-1) for name in reference.SHAPES])


def saved(optimizer: Any, kind: str) -> Tensor:
    """ "residual" or "shared" of this rank from ``state_dict()``, as one vector in the model's order."""
    buffers = optimizer.state_dict()["hvd_compress"]["buffers"][kind]
    return torch.cat([buffers[name].detach().reshape(-1) for name in reference.SHAPES]).clone()


def held(optimizer: Any) -> Tensor:
    """All that this rank holds back, as worker and as server, as one vector."""
    buffers = optimizer.state_dict()["hvd_compress"]["buffers"]
    kinds = [buffers.get(kind, {}) for kind in ("residual", "server")]
    found = [kind[name] for kind in kinds for name in reference.SHAPES if name in kind]
    return torch.cat([tensor.detach().reshape(-1) for tensor in found]).clone()


def through_a_file(value: Any) -> Any:
    """``value`` saved and loaded."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def resumes_exactly(
    make: Callable[[int], tuple[Any, Any]], steps: int, more: int, schedule: Callable[[int], float], what: str
) -> None:
    """Saved after ``steps`` steps a run goes on as if never interrupted: all at x, only the model there, or nothing.

    Args:
        make: gives a model and its optimizer, from a seed for the parameters.
    """
    for where in ("consensus", "model at consensus", "own"):
        model, optimizer = make(0)
        train(model, optimizer, steps, schedule)
        if where == "own":
            weights = through_a_file(model.state_dict())
        else:
            with optimizer.consensus():
                weights = through_a_file(model.state_dict())
                state = through_a_file(optimizer.state_dict())
        if where != "consensus":
            state = through_a_file(optimizer.state_dict())
        train(model, optimizer, more, schedule, first=steps)
        again, resumed = make(1)
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(again, resumed, more, schedule, first=steps)
        assert torch.equal(flat(again), flat(model)), f"{what}, saved at {where}"
        assert torch.equal(held(resumed), held(optimizer)), f"{what}, saved at {where}"
        with resumed.consensus():
            same_everywhere(flat(again), f"x after resuming, {what}, saved at {where}")


def raises(kind: type[BaseException], *fragments: str, call: Callable[[], Any]) -> None:
    """Fail unless ``call`` raises ``kind`` with every fragment in its message."""
    with pytest.raises(kind) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in {caught.value!s}"
