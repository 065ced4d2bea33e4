"""Ranks 0 and 2 of three train together: what they have after some steps is what they alone make of it."""

from __future__ import annotations

import harness
import horovod.torch as hvd
import torch
from common import close, flat, loss_of, network, same_everywhere, sgd, shared, take_step, train, virtual, wrap
from everything import EXACT, LOSSY

RANKS = (3,)
FULL_RANKS = (4,)
MPI_RANKS = (3,)
MEMBERS = [0, 2]


def check_members_train_on_their_own_mean() -> None:
    some = hvd.add_process_set(MEMBERS)
    for compression in EXACT:
        model, twin = network(torch.float64), network(torch.float64)
        optimizer, plain = wrap(model, sgd(model, momentum=0.9), compression, process_set=some), sgd(twin, momentum=0.9)
        train(model, optimizer, 6, lambda t: 0.05)
        for t in range(6):
            plain.param_groups[0]["lr"] = 0.05
            plain.zero_grad()
            for rank in MEMBERS if some.included() else [hvd.rank()]:
                (loss_of(twin, rank, t) / (len(MEMBERS) if some.included() else 1)).backward()
            plain.step()
        with optimizer.consensus():
            close(flat(model), flat(twin), 1e-10, f"parameters with {compression}")
    hvd.remove_process_set(some)


def check_members_agree_and_owe_each_other_only() -> None:
    """The virtual iterate moves by the members' mean gradient."""
    some = hvd.add_process_set(MEMBERS)
    for compression in LOSSY:
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression, process_set=some)
        start, total = flat(model), torch.zeros_like(flat(model))
        for t in range(5):
            gradients = torch.autograd.grad(loss_of(model, hvd.rank(), t), list(model.parameters()))
            mine = torch.cat([g.reshape(-1) for g in gradients])
            total += hvd.allreduce(mine, name="test.mean", process_set=some) if some.included() else mine
            take_step(model, optimizer, t)
        close(start - virtual(model, optimizer), 0.1 * total, 1e-6, f"y with {compression}")
        x = shared(model, optimizer)
        if some.included():
            every = hvd.allgather(x.reshape(1, -1), name="test.members", process_set=some)
            assert torch.equal(every[0], every[1]), f"members agree, {compression}"
        optimizer.flush()
    same_everywhere(torch.zeros(1), "still together")
    hvd.remove_process_set(some)


if __name__ == "__main__":
    harness.main(globals())
