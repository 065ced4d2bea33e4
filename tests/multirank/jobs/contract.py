"""Horovod's contract, row by row, for each kind of algorithm (arguments, hooks of gradients, synchronize)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import close, flat, loss_of, mean_gradients, network, raises, same_everywhere, sgd, train, wrap
from everything import BLOCKS, EXACT, LOSSY
from torch import nn

from hvd_compress import DEF, EF, Dense, DistributedOptimizer, Identity, Policy

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


def check_class_and_attributes() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        plain = sgd(model, momentum=0.9)
        optimizer = wrap(model, plain, compression)
        assert issubclass(type(optimizer), torch.optim.SGD)
        assert type(optimizer).__name__ == "SGD"
        assert optimizer._parameter_names == {p: n for n, p in model.named_parameters()}
        assert optimizer.defaults["lr"] == 0.1, "the user's defaults, for groups added later"
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, 2, lambda t: 0.1)
            scheduler.step()
    model = network()
    optimizer = DistributedOptimizer(sgd(model))
    assert sorted(optimizer._parameter_names.values()) == [f"allreduce.noname.0.{j}" for j in range(4)]
    named = [*model.named_parameters(), ("extra", nn.Parameter(torch.zeros(2)))]
    DistributedOptimizer(sgd(model), named_parameters=named)


def check_synchronize_leaves_the_aggregate() -> None:
    for compression in (Dense(), EF(Identity())):
        for op, factor in ((hvd.Average, 1.0), (hvd.Sum, float(hvd.size()))):
            model = network()
            expected = mean_gradients(model)
            optimizer = wrap(model, sgd(model), compression, op=op)
            loss_of(model, hvd.rank(), 0).backward()
            optimizer.synchronize()
            for p, mean in zip(model.parameters(), expected):
                close(p.grad, mean * factor, 1e-6, f"p.grad with {compression}, op={op}")


def check_gradients_can_be_looked_at_before_the_step() -> None:
    """Between backward() and step() p.grad is this rank's gradient, at the first step and at later ones."""
    for compression in (*EXACT, *LOSSY):
        if isinstance(compression, (Dense, Policy)):
            continue  # Dense reduces in place as soon as a bucket is complete, as Horovod does
        model, twin = network(), network()
        optimizer = wrap(model, sgd(model), compression, groups=2)
        for t in range(3):
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            loss_of(twin, hvd.rank(), t).backward()
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            for p, q in zip(model.parameters(), twin.parameters()):
                close(p.grad, q.grad, 1e-6, f"p.grad at step {t} with {compression}")
            optimizer.step()


def check_a_step_begun_can_be_given_up() -> None:
    """load_state_dict() and set_backward_passes_per_step() in the middle of a step clear what is under way."""
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model, momentum=0.9), compression, groups=2)
        train(model, optimizer, 2, lambda t: 0.1)
        with optimizer.consensus():
            weights = {n: v.clone() for n, v in model.state_dict().items()}
        state = copy.deepcopy(optimizer.state_dict())
        results = []
        for interrupted in (False, True):
            if interrupted:
                optimizer.zero_grad()
                loss_of(model, hvd.rank(), 7).backward()
            model.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
            if interrupted:
                loss_of(model, hvd.rank(), 8).backward()
                optimizer.set_backward_passes_per_step(1)
                optimizer.load_state_dict(copy.deepcopy(state))
            train(model, optimizer, 3, lambda t: 0.1, first=2)
            results.append(flat(model))
        assert torch.equal(results[0], results[1]), f"{compression}"


def check_sum_is_average_times_size() -> None:
    """Also for updates: training with Sum at lr is training with Average at P * lr, bitwise up to rounding."""
    for compression in (*EXACT, *LOSSY):
        results = []
        for op, lr in ((hvd.Average, 0.01 * hvd.size()), (hvd.Sum, 0.01)):
            model = network(torch.float64)
            optimizer = wrap(model, sgd(model, momentum=0.9), compression, op=op)
            train(model, optimizer, 20, lambda t, lr=lr: lr)
            with optimizer.consensus():
                results.append(flat(model))
        close(results[1], results[0], 1e-9, f"x with {compression}")


def check_predivide() -> None:
    for compression in (*EXACT, *BLOCKS):
        results = []
        for factor in (1.0, 4.0):
            model = network(torch.float64)
            optimizer = wrap(model, sgd(model), compression, gradient_predivide_factor=factor, groups=2)
            train(model, optimizer, 10, lambda t: 0.1)
            results.append(flat(model))
        close(results[1], results[0], 1e-12, f"parameters with {compression}")


def check_backward_passes_per_step() -> None:
    for compression in EXACT:
        model = network()
        expected = mean_gradients(model, (0, 1, 2))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = wrap(model, sgd(model), compression, backward_passes_per_step=2)
        optimizer.set_backward_passes_per_step(3)
        assert optimizer.backward_passes_per_step == 3
        for t in range(3):
            loss_of(model, hvd.rank(), t).backward()
        extra = loss_of(model, hvd.rank(), 3)
        if hvd.size() > 1:  # as Horovod, which counts no passes of one rank
            raises(AssertionError, "backward_passes_per_step", "parameter '", call=extra.backward)
        # The gradient of the refused pass has been added by torch already; take it away again.
        optimizer.set_backward_passes_per_step(3)
        for p in model.parameters():
            p.grad = None
        for t in range(3):
            loss_of(model, hvd.rank(), t).backward()
        optimizer.step()
        for p, b, mean in zip(model.parameters(), before, expected):
            close(p.detach(), b - 0.1 * mean, 1e-6, f"parameters with {compression}")
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), 0).backward()  # stepping before the passes are complete is allowed
        optimizer.step()


def check_predivide_keeps_sums_in_range() -> None:
    """What it is for: gradients whose sum float16 cannot hold are divided before, also in groups."""
    if hvd.size() == 1:
        return
    for groups in (None, 2):
        for factor, fits in ((1.0, False), (float(hvd.size()), True)):
            model = nn.Linear(4, 3).half()
            optimizer = wrap(model, sgd(model), Dense(), gradient_predivide_factor=factor, groups=groups)
            (model.weight.sum() * 4e4 + model.bias.sum() * 4e4).backward()
            optimizer.synchronize()
            for p in model.parameters():
                assert p.grad is not None
                whole = bool(torch.isfinite(p.grad).all())
                assert whole == fits, f"predivide by {factor}, groups={groups}: {p.grad}"
                if fits:
                    close(p.grad, torch.full_like(p.grad, 4e4), 1e-3, "the mean")


def check_groups_decide_what_travels_together() -> None:
    for compression in (*EXACT, *BLOCKS):
        if compression.exchanges_updates:
            continue  # all travel together after the step
        for form, wanted in (
            ([[0, 3], [1]], [{"0.weight", "2.bias"}, {"0.bias"}, {"2.weight"}]),
            (4, [{"0.weight"}, {"0.bias"}, {"2.weight"}, {"2.bias"}]),
            (1, [{"0.weight", "0.bias", "2.weight", "2.bias"}]),
        ):
            model = network()
            p = list(model.parameters())
            groups: Any = [[p[i] for i in group] for group in form] if isinstance(form, list) else form
            optimizer = wrap(model, sgd(model), compression, groups=groups)
            train(model, optimizer, 2, lambda t: 0.1)
            found = [set(state.bucket.layout.names) for state in optimizer._reducer.states]
            assert sorted(map(sorted, found)) == sorted(map(sorted, wanted)), f"{found} with {compression}, {groups}"


def check_groups_change_nothing() -> None:
    for compression in (*EXACT, *BLOCKS):
        results = []
        for form in (None, 1, 3, "lists"):
            model = network()
            p = list(model.parameters())
            groups: Any = [[p[0], p[3]], [p[1]]] if form == "lists" else form
            optimizer = wrap(model, sgd(model, momentum=0.9), compression, groups=groups)
            train(model, optimizer, 10, lambda t: 0.1)
            results.append(flat(model))
        for other in results[1:]:
            close(other, results[0], 1e-5, f"parameters with {compression}")


def check_clipping_between_synchronize_and_step() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.synchronize()
            before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            after = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
            assert after < 1.01e-3 < before
            with warnings.catch_warnings(), optimizer.skip_synchronize():
                warnings.simplefilter("error")
                optimizer.step()
        with optimizer.consensus():
            same_everywhere(flat(model), "x")
            close(flat(model), flat(network()), 3 * 0.1 * 1.1e-3, "three clipped steps are short")


def check_clipping_acts_on_what_synchronize_leaves() -> None:
    """The mean, or (where updates travel) this rank's own gradient."""
    for compression in EXACT:
        model, twin = network(torch.float64), network(torch.float64)
        optimizer = wrap(model, sgd(model), compression)
        loss_of(model, hvd.rank(), 0).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with optimizer.skip_synchronize():
            optimizer.step()
        loss_of(twin, hvd.rank(), 0).backward()
        local = compression.exchanges_updates
        gradient = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
        gradient = gradient if local else hvd.allreduce(gradient, name="test.clip.first")
        clipped = 0.01 * gradient / torch.linalg.vector_norm(gradient)
        clipped = hvd.allreduce(clipped, name="test.clip.last") if local else clipped
        with optimizer.consensus():
            close(flat(network(torch.float64)) - flat(model), 0.1 * clipped, 1e-4, f"the step with {compression}")


def check_one_optimizer_for_each_of_two_models() -> None:
    """Switching requires_grad between steps, as adversarial training does; names occur twice."""
    for compression in (*EXACT, *LOSSY):
        models = [network(), network(seed=1)]
        optimizers = [wrap(m, sgd(m), compression) for m in models]
        for t in range(4):
            active = t % 2
            for k, model in enumerate(models):
                for p in model.parameters():
                    p.requires_grad_(k == active)
            optimizers[active].zero_grad()
            loss_of(models[active], hvd.rank(), t).backward()
            optimizers[active].step()
        for model, optimizer in zip(models, optimizers):
            with optimizer.consensus():
                same_everywhere(flat(model), "x")


def check_first_step_counts_its_exchange_only() -> None:
    for compression in (Dense(), EF(Identity()), DEF(Identity()), *BLOCKS):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        sent: list[float] = []
        train(model, optimizer, 3, lambda t: 0.1, after_step=lambda t: sent.append(optimizer.stats().bytes_sent))  # noqa: B023
        assert max(sent) - min(sent) < 1e-6, f"{sent} with {compression}"
        if hvd.size() > 1:
            assert optimizer.stats().total_bytes_sent > sum(sent), "the total has the handshake as well"


def check_order_of_hooks_does_not_matter() -> None:
    for compression in (*EXACT, *LOSSY):
        results = []
        for shuffled in (False, True):
            torch.manual_seed(0)
            parameters = nn.ParameterList([nn.Parameter(torch.randn(40)) for _ in range(6)])
            optimizer = wrap(parameters, sgd(parameters), compression, groups=3)
            for _ in range(6):
                optimizer.zero_grad()
                order = list(parameters)
                if shuffled and hvd.rank() % 2:
                    order.reverse()
                for k, p in enumerate(order):  # one backward each: the hooks fire in just this order
                    index = len(order) - 1 - k if shuffled and hvd.rank() % 2 else k
                    ((p * (index + 1 + hvd.rank())) ** 2).mean().backward()
                optimizer.step()
            results.append(flat(parameters))
        assert torch.equal(results[0], results[1]), f"order changes the result of {compression}"


if __name__ == "__main__":
    harness.main(globals())
