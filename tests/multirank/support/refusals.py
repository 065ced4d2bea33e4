"""Calls that must be refused: each with its error on every rank, after which training goes on."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import EF, RandomBlock
from tests.multirank.support.assertions import raises
from tests.multirank.support.internals import optimizers_so_far
from tests.multirank.support.training import sgd, wrap


class Bad(NamedTuple):
    """A call that must be refused.

    Attributes:
        call: makes it; what it needs is built inside.
        fragments: parts of the message; "{rank}" in them stands for the rank.
        kind: class of the error.
    """

    call: Callable[[], Any]
    fragments: tuple[str, ...]
    kind: type[BaseException] = ValueError


def refused(bad: Bad) -> None:
    """Fail unless a call raises its error on this rank, and all ranks can go on (collective)."""
    fragments = [fragment.replace("{rank}", str(hvd.rank())) for fragment in bad.fragments]
    raises(bad.kind, *fragments, call=bad.call)
    still_works()


def still_works() -> None:
    """Fail unless an optimizer still trains, Horovod sums, and all ranks have built as many optimizers."""
    model, optimizer = _healthy()
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    mine = torch.tensor([1.0, optimizers_so_far()])
    total = hvd.allreduce(mine, op=hvd.Sum, name="test.alive")
    assert total.tolist() == [hvd.size(), hvd.size() * optimizers_so_far()], "one rank has built more optimizers"


@functools.cache
def _healthy() -> tuple[nn.Module, Any]:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.5)
    return model, wrap(model, sgd(model), EF(RandomBlock(0.5)))
