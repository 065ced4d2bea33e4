"""More rows of Horovod's contract: accumulation, pre-division, groups, Adasum, saved states, with every algorithm."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import close, flat, loss_of, network, raises, same_everywhere, train, wrap
from everything import BLOCKS, EXACT, LOSSY
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, Policy, RandomBlock

RANKS = (2,)
FULL_RANKS = (1, 3)
MPI_RANKS = (2,)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def check_accumulated_passes_are_one_pass_of_the_sum() -> None:
    for compression in (*EXACT, *LOSSY):
        results = []
        for passes in (1, 2):
            model = network(torch.float64)
            optimizer = wrap(model, sgd(model), compression, backward_passes_per_step=passes)
            for t in range(5):
                optimizer.zero_grad()
                losses = [loss_of(model, hvd.rank(), 2 * t + i) for i in range(2)]
                for loss in losses if passes == 2 else [losses[0] + losses[1]]:
                    loss.backward()
                optimizer.step()
            results.append(flat(model))
        close(results[1], results[0], 1e-9, f"parameters with {compression}")


def check_a_dropped_optimizer_is_gone() -> None:
    """Its memory is free, its hooks on the model's parameters do nothing: another optimizer may take the model."""
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 2, lambda t: 0.05)
        dropped = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert dropped() is None, f"{compression} stays"
        loss_of(model, hvd.rank(), 2).backward()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 2, lambda t: 0.05)
        with optimizer.consensus():
            same_everywhere(flat(model), f"x after {compression} was dropped and built anew")
        parameter = weakref.ref(next(model.parameters()))
        del optimizer, model
        gc.collect()
        assert parameter() is None, f"parameters stay after {compression}"


def check_predivide_alone() -> None:
    for compression in (*EXACT, *BLOCKS):
        results = []
        for factor in (1.0, 3.0):
            model = network(torch.float64)
            train(model, wrap(model, sgd(model), compression, gradient_predivide_factor=factor), 6, lambda t: 0.05)
            results.append(flat(model))
        close(results[1], results[0], 1e-12, f"parameters with {compression}")


def check_the_aggregate_is_the_same_everywhere() -> None:
    """What synchronize() leaves in p.grad of a lossy algorithm; what it stands for is compared in papers.py."""
    for compression in LOSSY:
        if isinstance(compression, LIEC) or getattr(compression, "exchanges_updates", True):
            continue
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        for t in range(4):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.synchronize()
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            assert bool(gradient.any())
            same_everywhere(gradient, f"p.grad with {compression}")
            with optimizer.skip_synchronize():
                optimizer.step()


def check_one_group_per_parameter() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model), compression, groups=4)
        train(model, optimizer, 4, lambda t: 0.05)
        with optimizer.consensus():
            same_everywhere(flat(model), f"x with {compression}")


def check_adasum_trains() -> None:
    if hvd.size() & (hvd.size() - 1):
        return  # Horovod's Adasum wants a power of two
    if not hvd.mpi_enabled():
        return  # and MPI, where there is no GPU
    model = network()
    optimizer = wrap(model, sgd(model), Dense(), op=hvd.Adasum)
    before = flat(model)
    train(model, optimizer, 3, lambda t: 0.05)
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)


def check_states_load_without_unpickling_code() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 3, lambda t: 0.05)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        train(model, optimizer, 2, lambda t: 0.05, first=3)


def check_a_policy_keeps_small_tensors_dense() -> None:
    """Biases go dense, the rest in blocks: what is held back of biases is nothing, their mean is exact."""
    for default in (EF(RandomBlock(0.25)), DEF(RandomBlock(0.25), 0.0)):
        rules: list[Any] = [
            Policy(default, dense_dims=1),
            Policy(default, dense_below=10),
            Policy(default, patterns={"*.bias": Dense()}),
        ]
        for policy in rules:
            model = network(torch.float64)
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
            twin = network(torch.float64)
            loss_of(twin, hvd.rank(), 0).backward()
            train(model, optimizer, 1, lambda t: 0.1)
            for (name, p), q in zip(model.named_parameters(), twin.parameters()):
                mean = hvd.allreduce(q.grad, name=f"test.policy.{name}")
                exact = torch.allclose(p.detach(), q.detach() - 0.1 * mean, rtol=1e-12, atol=1e-13)
                assert exact == name.endswith("bias"), f"{name} with {policy}"


def check_groups_choose_algorithms() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    policy = Policy(EF(RandomBlock(0.25)), groups={1: Dense()})
    optimizer = wrap(model, torch.optim.SGD(groups, lr=0.05), policy)
    train(model, optimizer, 3, lambda t: 0.05)
    assert set(optimizer.state_dict()["hvd_compress"]["buffers"]["residual"]) == {"0.weight", "0.bias"}
    same_everywhere(flat(model), "parameters")


def check_groups_may_come_in_another_order_but_not_be_others() -> None:
    for compression in (*EXACT, *BLOCKS):
        model = network()
        p = list(model.parameters())
        groups = [[p[0], p[2]], [p[1]]] if hvd.rank() == 0 else [[p[1]], [p[2], p[0]]]
        optimizer = wrap(model, sgd(model), compression, groups=groups)
        train(model, optimizer, 3, lambda t: 0.05)
        with optimizer.consensus():
            same_everywhere(flat(model), f"x with {compression}")
    if hvd.size() == 1:
        return
    other = [[p[0], p[2 if hvd.rank() == 0 else 3]]]
    raises(
        ValueError,
        "groups",
        "disagree",
        f"this is rank {hvd.rank()}",
        call=lambda: wrap(model, torch.optim.SGD(p, lr=0.1), Dense(), groups=other),
    )


if __name__ == "__main__":
    harness.main(globals())
