"""Learning rates that fall to almost nothing and rise again: no algorithm lets old gradients grow by thousands."""

from __future__ import annotations

import math
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR

from hvd_compress import DEF, EF, LIEC, BlockSign, Dense, DistEF, LowRank, RandomBlock, TopK
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.training import wrap

RANKS = (2,)
CYCLE = 60
GRADIENTS = (EF(RandomBlock(1 / 8)), EF(TopK(1 / 16)), EF(BlockSign()), EF(LowRank(1)), LIEC())
UPDATES = (DEF(RandomBlock(1 / 8)), DistEF())


def losses(compression: Any, schedule: str, nesterov: bool) -> list[float]:
    """Return the mean loss over ranks at each of two cycles' steps of a small classification."""
    truth = torch.randn(16, 4, generator=torch.Generator(device="cpu").manual_seed(7), device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    inner = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=nesterov)
    optimizer = wrap(model, inner, compression)
    if schedule == "restarts":
        scheduler: Any = CosineAnnealingWarmRestarts(optimizer, T_0=CYCLE)
    else:
        scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=2 * CYCLE, cycle_momentum=False)
    generator = torch.Generator(device="cpu").manual_seed(hvd.rank())
    found = []
    device = next(model.parameters()).device
    for _ in range(2 * CYCLE):
        x = torch.randn(32, 16, generator=generator, device="cpu")
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), (x @ truth).argmax(1).to(device))
        loss.backward()
        optimizer.step()
        scheduler.step()
        found.append(float(loss.detach()))
    mean: list[float] = hvd.allreduce(torch.tensor(found), name="test.losses").tolist()
    return mean


@cases(
    compression=(Dense(), *GRADIENTS, *UPDATES),
    schedule=more_in_full(("restarts",), ("one cycle",)),
    nesterov=more_in_full((True,), (False,)),
)
def check_no_explosion_when_the_rate_rises_again(compression: Any, schedule: str, nesterov: bool) -> None:
    found = losses(compression, schedule, nesterov)
    assert all(math.isfinite(loss) for loss in found)
    assert max(found[CYCLE:]) < 2 * found[0], f"{compression}: {max(found[CYCLE:]):.3g} after {found[0]:.3g}"
    assert sum(found[-10:]) < 10 * found[0]
