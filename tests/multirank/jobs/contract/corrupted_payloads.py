"""A rank that sends a corrupted payload: every rank ends the step with the same error, which names that rank."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import torch
from torch import Tensor

from hvd_compress import DEF, EF, LIEC, BlockSign, CountSketch, Dense, DistEF, GlobalSketch, GlobalTopK, TopK
from hvd_compress.comm import plain_values
from tests.multirank.support.assertions import raises
from tests.multirank.support.cases import by_mpi, cases
from tests.multirank.support.internals import corrupt, corrupt_length
from tests.multirank.support.networks import Embedded, flat
from tests.multirank.support.training import make, take_step, wrap

RANKS = (3,)
FULL_RANKS = (2, 4)
MPI_RANKS = (3,)
GATHERED = (EF(TopK(0.25)), EF(TopK(0.25, sampled=True)), DEF(TopK(0.25)))
SERVERS = (DistEF(TopK(0.25)), DistEF(BlockSign(), TopK(0.25)), LIEC(TopK(0.25)))


def fails(compression: Any, change: Callable[[Any], None], *fragments: str, late: bool = False) -> None:
    """Train for two steps; the last rank's exchange is changed in between, and the second step fails on every rank.

    The flaws that only a payload's content shows are found by an accelerator, and known one step later.
    """
    model, optimizer = make(compression)
    take_step(model, optimizer, 0)
    sender = hvd.size() - 1
    if hvd.rank() == sender:
        change(optimizer)
    fragments = ("corrupted", f"rank {sender}", f"(seen by rank {hvd.rank()})", *fragments)
    if late and next(model.parameters()).device.type != "cpu":
        take_step(model, optimizer, 1)
        fragments = ("corrupted", f"rank(s) [{sender}]", "the exchange before this one", "zeros were applied")
    raises(RuntimeError, *fragments, call=lambda: take_step(model, optimizer, 2))


@cases(compression=(*GATHERED, *SERVERS), index=(-1, 2**31 - 1, -(2**31)))
def check_an_index_out_of_range(compression: Any, index: int) -> None:
    fails(
        compression,
        lambda optimizer: corrupt(optimizer, lambda indices: indices[:1].fill_(index)),
        str(index),
        "TopK",
        late=True,
    )


@cases(*GATHERED, *SERVERS)
def check_an_index_twice(compression: Any) -> None:
    def repeat(indices: Tensor) -> None:
        indices[1:2] = indices[:1]

    fails(compression, lambda optimizer: corrupt(optimizer, repeat), "TopK", "in slot 1", late=True)


@cases(compression=(EF(TopK(0.25)), EF(BlockSign()), DistEF(), LIEC(BlockSign(4)), DistEF(BlockSign(), TopK(0.25))))
def check_payloads_of_another_length(compression: Any) -> None:
    fails(compression, corrupt_length, "expected")


def check_a_sketch_of_another_length() -> None:
    fails(GlobalSketch(CountSketch(columns=8, rows=3), "allgather"), corrupt_length, "expected")


@by_mpi
@cases(compression=(GlobalTopK(0.25),), index=(-1, 2**31 - 1))
def check_an_index_out_of_range_in_a_tree(compression: Any, index: int) -> None:
    fails(compression, lambda optimizer: corrupt(optimizer, lambda indices: indices[:1].fill_(index)))


@cases(place=(-1, 20, 2**62))
def check_sparse_gradients(place: int) -> None:
    model = Embedded()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), Dense())
    before = flat(model)
    sender = hvd.size() - 1

    def step() -> None:
        model(torch.tensor([hvd.rank(), 1])).square().sum().backward()
        if hvd.rank() == sender:
            gradient = model.table.weight.grad
            assert gradient is not None
            indices = gradient.coalesce().indices().clone()
            indices[0, -1] = place
            # Already "coalesced", so that nothing here looks at the index.
            model.table.weight.grad = torch.sparse_coo_tensor(
                indices, gradient.coalesce().values(), gradient.shape, is_coalesced=True, check_invariants=False
            )
        optimizer.step()

    raises(RuntimeError, "corrupted sparse gradient", f"rank {sender} has sent the index [{place}]", call=step)
    assert torch.equal(flat(model), before)


def check_what_ranks_agree_on() -> None:
    sender, make_message = hvd.size() - 1, plain_values.message_of
    if hvd.rank() == sender:
        plain_values.message_of = lambda value: b"=[1"
    try:
        raises(RuntimeError, f"corrupted data from rank {sender}", call=lambda: make(Dense()))
    finally:
        plain_values.message_of = make_message
    if hvd.rank() == sender:
        plain_values.message_of = lambda value: make_message(object())
    try:
        raises(TypeError, f"rank {sender} has a value that cannot be sent", "object", call=lambda: make(Dense()))
    finally:
        plain_values.message_of = make_message
    make(Dense())
