"""The networks that jobs train: the numpy reference's in torch, and one with an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.multirank.support import reference


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return the reference's model, an ``nn.Sequential``, with the reference's initial parameters."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for name, value in reference.initial(seed).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """Return the reference's loss on the data of ``rank`` at ``step``."""
    like = next(model.parameters())
    inputs, targets = (torch.from_numpy(a).to(like) for a in reference.batch(rank, step))
    loss: Tensor = ((model(inputs) - targets) ** 2).mean()
    return loss


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
    """Return a copy of all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def device_type() -> str:
    """Return where models and tensors are: "cpu", or "cuda" if the launch was told so."""
    return torch.empty(0).device.type
