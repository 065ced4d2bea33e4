"""EF's aggregate goes into zeros that are kept: whoever writes to p.grad, the next aggregate is right."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from hvd_compress import EF, DistributedOptimizer, RandomBlock, RandomK, TopK

WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda g: None,
    "scaled": lambda g: g.mul_(0.5),
    "noise": lambda g: g.add_(torch.ones_like(g)),
    "behind autograd's back": lambda g: g.data.add_(torch.ones_like(g)),
    "one row": lambda g: g[:1].fill_(7.0),
}


@pytest.mark.parametrize("compressor", [RandomBlock(density=0.2), RandomK(density=0.2), TopK(density=0.2)], ids=str)
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("to_none", [True, False])
def test_only_what_was_sent_is_there(compressor: Any, write: Callable[[torch.Tensor], Any], to_none: bool) -> None:
    hvd.init()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = DistributedOptimizer(sgd, model.named_parameters(), compression=EF(compressor))
    owed = {p: torch.zeros_like(p) for p in model.parameters()}
    for t in range(8):
        optimizer.zero_grad(set_to_none=to_none)
        inputs = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(t))
        model(inputs).square().sum().backward()
        gradients = {p: p.grad.clone() for p in model.parameters()}
        optimizer.synchronize()
        buffers = optimizer.state_dict()["hvd_compress"]["buffers"]["residual"]
        sent = 0
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert p.grad.shape == p.shape
            # At one rank: what was owed and computed is either sent or still owed.
            torch.testing.assert_close(p.grad + buffers[name], owed[p] + gradients[p], msg=f"{name} at step {t}")
            owed[p] = buffers[name].clone()
            sent += int((p.grad != 0).sum())
            write(p.grad)
        assert sent <= 0.2 * sum(p.numel() for p in model.parameters()) + 4
        with optimizer.skip_synchronize():
            optimizer.step()
