"""Which parameters take part: frozen, unused, unfrozen, added, sparse, in groups, in a process set."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import Embedded, close, flat, loss_of, network, same_everywhere, train, wrap
from everything import EXACT, LOSSY
from torch import nn

from hvd_compress import DEF, CountSketch, Dense, GlobalSketch, Identity, TopK

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)


class Forked(nn.Module):
    """Ranks take different branches, so each has gradients that others lack; one part is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, branch: int) -> torch.Tensor:
        out: torch.Tensor = self.branches[branch](x)
        return out


def check_gradients_missing_on_some_ranks() -> None:
    for compression in (*EXACT, *LOSSY):
        model = Forked()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
        for t in range(8):
            optimizer.zero_grad()
            model(torch.ones(2, 3), (hvd.rank() + t) % 4).sum().backward()
            optimizer.step()
        optimizer.flush()
        same_everywhere(flat(model), f"parameters with {compression}")
        # Over 8 steps each branch got the gradient of ones from each rank twice: mean over ranks, summed.
        for name, p in model.named_parameters():
            drop = 0.0 if name.startswith("unused") else 0.1 * 2 * 2
            close(p.detach(), before[name] - drop, 1e-5, f"{name} with {compression}")


def check_frozen_parameters_stay() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        model[0].weight.requires_grad_(False)
        before = model[0].weight.detach().clone()
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), compression)
        train(model, optimizer, 5, lambda t: 0.1)
        assert torch.equal(before, model[0].weight.detach())
        assert model[0].weight.grad is None


def check_unfrozen_parameters_join() -> None:
    for compression in EXACT:
        model = network()
        model[0].weight.requires_grad_(False)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression)
        train(model, optimizer, 2, lambda t: 0.1)
        model[0].weight.requires_grad_(True)
        before = model[0].weight.detach().clone()
        train(model, optimizer, 3, lambda t: 0.1, first=2)
        assert not torch.equal(before, model[0].weight.detach())
        same_everywhere(flat(model), f"parameters with {compression}")


def check_added_parameter_group() -> None:
    for compression in EXACT:
        model = network()
        optimizer = wrap(model, torch.optim.SGD(model[0].parameters(), lr=0.05, momentum=0.9), compression)
        train(model, optimizer, 2, lambda t: 0.05)
        for p in model[2].parameters():
            p.grad = None
        optimizer.add_param_group({"params": list(model[2].parameters())})
        assert optimizer.param_groups[1]["lr"] == 0.05
        assert optimizer._parameter_names[model[2].weight] == "2.weight"
        before = model[2].weight.detach().clone()
        train(model, optimizer, 3, lambda t: 0.05, first=2)
        assert not torch.equal(before, model[2].weight.detach())
        same_everywhere(flat(model), f"parameters with {compression}")


def check_groups_with_learning_rates_of_their_own() -> None:
    """Two groups, two rates that change at different steps, against the reference run per group's rate."""
    for compression in EXACT:
        model, twin = network(torch.float64), network(torch.float64)

        def grouped(m: nn.Sequential) -> torch.optim.SGD:
            second: dict[str, Any] = {"params": m[2].parameters(), "lr": 0.01, "weight_decay": 0.1}
            return torch.optim.SGD([{"params": m[0].parameters()}, second], lr=0.05, momentum=0.9)

        optimizer, plain = wrap(model, grouped(model), compression), grouped(twin)
        for t in range(20):
            for o in (optimizer, plain):
                o.param_groups[0]["lr"] = 0.05 / (1 + t)
                o.param_groups[1]["lr"] = 0.01 if t < 10 else 0.001
                o.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.step()
            loss_of(twin, hvd.rank(), t).backward()
            for name, p in twin.named_parameters():
                p.grad = hvd.allreduce(p.grad, name=f"test.{name}")
            plain.step()
        close(flat(model), flat(twin), 1e-12, f"parameters with {compression}")


def run_embedded(compression: Any, skip_on: int = -1, **kwargs: Any) -> tuple[torch.Tensor, Any, float]:
    model = Embedded()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), compression, **kwargs)
    for t in range(4):
        optimizer.zero_grad()
        if hvd.rank() != skip_on:
            index = torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])
            model(index).square().sum().backward()
        optimizer.step()
    with optimizer.consensus():
        return flat(model), model.table.weight.grad, optimizer.stats().bytes_sent


def check_sparse_gradients() -> None:
    for skip_on in (-1, 0):
        expected: Any = None
        for compression in (*EXACT, *LOSSY):
            sent = {}
            for as_dense in (False, True):
                what = f"{compression}, sparse_as_dense={as_dense}, skipped by {skip_on}"
                result, grad, sent[as_dense] = run_embedded(compression, skip_on, sparse_as_dense=as_dense)
                same_everywhere(result, f"x, {what}")
                if not compression.exchanges_updates and hvd.rank() != skip_on:
                    assert grad.is_sparse, what
                if compression in EXACT:
                    expected = result if expected is None else expected
                    close(result, expected, 1e-6, what)
            if compression == Dense() and hvd.size() > 1 and skip_on == -1:
                # Two rows of the table's twenty, with their indices, to each other rank; or all of them, summed.
                assert sent[False] < sent[True] / 1.5, sent


def check_sparse_momentum_where_a_rank_has_no_gradient() -> None:
    for skipped in ((2, 3), (0, 2)):
        results = []
        for compression in (Dense(), DEF(Identity())):
            model = Embedded()
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), compression)
            for t in range(5):
                optimizer.zero_grad()
                index = torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])
                skips = hvd.rank() == hvd.size() - 1 and t in skipped
                (model.head(torch.ones(3, 4)) if skips else model(index)).square().sum().backward()
                optimizer.step()
            results.append(flat(model))
            same_everywhere(results[-1], f"parameters with {compression}")
        close(results[1], results[0], 1e-5, f"DEF against Dense, gradient missing at {skipped}")


def check_momentum_of_sparse_gradients_is_masked() -> None:
    """As that of dense ones, also clipped, and under Nesterov momentum, which torch keeps sparse."""
    masked = DEF(TopK(0.25), 0.0, masking=True, clip_norm=0.5)
    for compression in (masked, GlobalSketch(CountSketch(columns=8, rows=3))):
        for nesterov in (False, True):
            results = []
            for is_sparse in (False, True):
                model = Embedded()
                model.table.sparse = is_sparse
                sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=nesterov)
                optimizer = wrap(model, sgd, compression)
                for t in range(6):
                    optimizer.zero_grad()
                    model(torch.tensor([(hvd.rank() * 3 + t) % 20, 1, 1])).square().sum().backward()
                    optimizer.step()
                results.append(flat(model))
            assert torch.isfinite(results[0]).all()
            close(results[1], results[0], 1e-5, f"sparse against dense gradients, {compression}, nesterov={nesterov}")


def check_process_set() -> None:
    if hvd.size() == 1:
        return  # Horovod refuses a second set of all ranks
    members = [0, hvd.size() - 1] if hvd.size() > 2 else [0]
    some = hvd.add_process_set(members)
    for compression in (*EXACT, *LOSSY):
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
            for t in range(2):  # no hooks, so nobody counts passes or minds what happens to gradients
                loss_of(model, hvd.rank(), t).backward()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(before, flat(model))
    hvd.remove_process_set(some)


def check_channels_last_and_odd_shapes() -> None:
    for compression in (*EXACT, *LOSSY):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scalar = nn.Parameter(torch.ones(()))
        model.register_parameter("scalar", scalar)
        model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
        strides = [p.stride() for p in model.parameters()]
        for t in range(4):
            torch.manual_seed(100 * t + hvd.rank())
            optimizer.zero_grad()
            inputs = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
            (model(inputs).square().mean() * scalar).backward()
            optimizer.step()
        assert [p.stride() for p in model.parameters()] == strides
        with optimizer.consensus():
            same_everywhere(flat(model), f"parameters with {compression}")


if __name__ == "__main__":
    harness.main(globals())
