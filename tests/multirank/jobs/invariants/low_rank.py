"""Low rank: what this rank has contributed is taken off, so residuals stay bounded, whatever becomes of other ranks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, LowRank, RandomBlock
from tests.multirank.support.assertions import close
from tests.multirank.support.cases import cases, more_in_full, several_ranks
from tests.multirank.support.training import shared_model, wrap

RANKS = (3,)
FULL_RANKS = (2, 4)
LR = 0.05
COMPRESSIONS = more_in_full((EF(LowRank(2)), DEF(LowRank(2))), (DEF(LowRank(2), 0.0), EF(RandomBlock(1 / 8))))


class Skewed:
    """Linear losses of a 16 x 24 matrix whose gradients differ by parts with a mean of zero, and are else the same."""

    def __init__(self, compression: Any) -> None:
        generator = torch.Generator(device="cpu").manual_seed(1)
        apart = torch.randn(hvd.size(), 16, 24, generator=generator, device="cpu")
        apart -= apart.mean(0)
        self.common = 0.1 * torch.randn(16, 24, generator=generator, device="cpu")
        self.apart, self.own = apart, self.common + apart[hvd.rank()]
        self.model = nn.Linear(24, 16, bias=False)
        with torch.no_grad():
            self.model.weight.zero_()
        self.optimizer = wrap(self.model, torch.optim.SGD(self.model.parameters(), lr=LR), compression)

    def train(self, steps: int) -> None:
        """Take some steps."""
        own = self.own.to(self.model.weight.device)
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model.weight * own).sum().backward()
            self.optimizer.step()

    def point(self) -> torch.Tensor:
        """Return the shared model (collective)."""
        return shared_model(self.model, self.optimizer)


@cases(compression=COMPRESSIONS)
def check_the_residual_is_bounded(compression: Any) -> None:
    run = Skewed(compression)
    run.train(50)
    early = run.optimizer.stats().residual_norm
    run.train(200)
    assert run.optimizer.stats().residual_norm < 3 * early + 1e-6
    run.optimizer.flush()
    close(run.model.weight.detach().cpu(), -LR * 250 * run.common, 1e-3, "the model")


@several_ranks
@cases(compression=COMPRESSIONS)
def check_a_rank_that_joins_takes_no_residual_that_others_need(compression: Any) -> None:
    """After it has gone, a step moves the model by gradients of the usual size."""
    run = Skewed(compression)
    run.train(80)
    before = run.point()
    last = hvd.size() - 1
    moved = torch.zeros(1)
    if hvd.rank() != last:
        run.train(1)
        moved += float((run.point() - before).norm())
    hvd.join()
    fair = LR * float(((last * run.common - run.apart[last]) / hvd.size()).norm())
    residual = LR * float(run.apart.flatten(1).norm(dim=1).max())
    total = float(hvd.allreduce(moved, op=hvd.Sum, name="test.moved")) / last
    assert total < 3 * fair + 8 * residual, (total, fair, residual)


@several_ranks
@cases(compression=COMPRESSIONS)
def check_a_state_of_rank_zero_alone_does_not_make_the_model_jump(compression: Any) -> None:
    run = Skewed(compression)
    run.train(80)
    state = hvd.broadcast_object(run.optimizer.state_dict() if hvd.rank() == 0 else {}, root_rank=0, name="test.state")
    with run.optimizer.consensus():
        weights = copy.deepcopy(run.model.state_dict())
    again = Skewed(compression)
    again.model.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the other ranks have not sent is lost, as it says
        again.optimizer.load_state_dict(state)
    before = again.point()
    again.train(5)
    assert float((again.point() - before).norm()) < 60 * LR * float(run.common.norm())
