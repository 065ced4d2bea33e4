"""Process sets: members train together, the other ranks on their own."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import EF
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, only
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import process_set, sgd, shared_model, take_step, train, virtual_iterate, wrap

RANKS = (3,)
FULL_RANKS = (2, 4)
MPI_RANKS = (2, 3)
PROCESS_SETS = True
MEMBERS = [0, 2]


@cases(EXACT, LOSSY)
def check_members_agree_and_others_train_on_their_own(compression: Any) -> None:
    members = [0, hvd.size() - 1] if hvd.size() > 2 else [0]
    with process_set(members) as some:
        model = network()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression, process_set=some)
        before = flat(model)
        for t in range(5):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        with optimizer.consensus():
            every = hvd.allgather(flat(model).reshape(1, -1), name="test.sets")
        assert torch.equal(every[members[0]], every[members[-1]]), "members agree"
        if hvd.rank() not in members:
            plain = network()
            reference_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
            for t in range(5):
                reference_optimizer.zero_grad()
                loss_of(plain, hvd.rank(), t).backward()
                reference_optimizer.step()
            assert torch.equal(flat(model), flat(plain)), "ranks outside train on their own"
            for t in range(2):  # without hooks nothing counts passes or refuses zero_grad()
                loss_of(model, hvd.rank(), t).backward()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(before, flat(model))


@only(lambda job: job.ranks > 2)
@cases(EXACT)
def check_members_train_on_their_own_mean(compression: Any) -> None:
    with process_set(MEMBERS) as some:
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


@only(lambda job: job.ranks > 2)
@cases(LOSSY)
def check_virtual_iterate_moves_by_the_members_mean_gradient(compression: Any) -> None:
    with process_set(MEMBERS) as some:
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model), compression, process_set=some)
        start, total = flat(model), torch.zeros_like(flat(model))
        for t in range(5):
            gradients = torch.autograd.grad(loss_of(model, hvd.rank(), t), list(model.parameters()))
            mine = torch.cat([g.reshape(-1) for g in gradients])
            total += hvd.allreduce(mine, name="test.mean", process_set=some) if some.included() else mine
            take_step(model, optimizer, t)
        close(start - virtual_iterate(model, optimizer), 0.1 * total, 1e-6, f"y with {compression}")
        x = shared_model(model, optimizer)
        if some.included():
            every = hvd.allgather(x.reshape(1, -1), name="test.members", process_set=some)
            assert torch.equal(every[0], every[1]), f"members agree, {compression}"
        optimizer.flush()
        same_everywhere(torch.zeros(1), "still together")


@only(lambda job: job.ranks > 2)
def check_a_set_of_other_ranks_with_the_number_of_a_removed_one() -> None:
    """Horovod gives numbers again; who was a member of the former set calls its collectives as newcomers do."""
    for members in ([0, 1], [1, 2], [0, 2]):
        with process_set(members) as some:
            if some.included():
                model = network()
                optimizer = wrap(model, sgd(model), EF(BLOCK), process_set=some)
                train(model, optimizer, 2, lambda t: 0.05)
                every = hvd.allgather(flat(model).reshape(1, -1), name="test.again", process_set=some)
                assert torch.equal(every[0], every[1])
