"""What users' scripts do besides the usual loop: memory exchanged, gradients set by hand, compiled, wrapped anew."""

from __future__ import annotations

import gc
import warnings
from typing import Any, Callable, Optional

import harness
import horovod.torch as hvd
import torch
from common import close, flat, loss_of, network, raises, same_everywhere, sgd, shared, take_step, train, wrap
from everything import BLOCK, EXACT, LOSSY
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, DistEF, Identity, RandomBlock, TopK

RANKS = (2,)
FULL_RANKS = (1, 3)
MPI_RANKS = (2,)


class Rebinding(torch.optim.Optimizer):
    """Gradient descent that gives parameters new memory, has no learning rate, and a ``zero_grad`` of old."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None})

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Optional[Callable[[], Any]] = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - 0.1 * p.grad


def check_an_optimizer_may_give_parameters_new_memory() -> None:
    for compression in (*EXACT, *LOSSY):
        results = []
        for build in (lambda m: sgd(m), lambda m: Rebinding(m.parameters())):
            model = network(torch.float64)
            optimizer = wrap(model, build(model), compression)
            for t in range(6):
                take_step(model, optimizer, t)
            results.append(shared(model, optimizer))
        close(results[1], results[0], 1e-12, f"p.data = ... in step() with {compression}")


def check_gradients_may_be_given_new_memory() -> None:
    """``p.grad.data = ...`` after ``synchronize()`` or after ``step()``, as clipping by hand or ``Module.to`` does."""
    for compression in EXACT:
        if not compression.exchanges_updates:
            results = []
            for exchanged in (True, False):
                model = network(torch.float64)
                optimizer = wrap(model, sgd(model), compression)
                for t in range(6):
                    optimizer.zero_grad()
                    loss_of(model, hvd.rank(), t).backward()
                    optimizer.synchronize()
                    for p in model.parameters():
                        assert p.grad is not None
                        if exchanged:
                            p.grad.data = p.grad.data.clamp(-0.1, 0.1)
                        else:
                            p.grad.clamp_(-0.1, 0.1)
                    with optimizer.skip_synchronize():
                        optimizer.step()
                    for p in model.parameters() if exchanged else ():
                        assert p.grad is not None
                        p.grad.data = torch.zeros_like(p.grad)
                same_everywhere(flat(model), f"p.grad.data = ... with {compression}")
                results.append(flat(model))
            close(results[1], results[0], 1e-12, f"p.grad.data = ... with {compression}")


def check_gradients_set_after_a_closure_are_exchanged() -> None:
    for compression in EXACT:
        model, twin = network(torch.float64), network(torch.float64)
        optimizer, plain = wrap(model, sgd(model), compression), sgd(twin)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, hvd.rank(), 0)
            loss.backward()
            return loss, "and more"

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss, more = optimizer.step(closure)
            assert more == "and more" and loss.numel() == 1
            for p in model.parameters():
                p.grad = torch.full_like(p, 1.0 + hvd.rank())
            optimizer.step()
        gradients = torch.autograd.grad(loss_of(twin, hvd.rank(), 0), list(twin.parameters()))
        for p, gradient in zip(twin.parameters(), gradients):
            p.grad = hvd.allreduce(gradient, name="test.mean")
        plain.step()
        for p in twin.parameters():
            p.grad = torch.full_like(p, (1.0 + hvd.size()) / 2)
        plain.step()
        with optimizer.consensus():
            close(flat(model), flat(twin), 1e-12, f"gradients set by hand with {compression}")


def check_a_plain_state_leaves_the_shared_model() -> None:
    """It has no residuals; the model stays, or is the one that was loaded before."""
    for compression in (*LOSSY, DEF(BLOCK, local_steps=3)):
        for loads in (False, True):
            model = network()
            optimizer = wrap(model, sgd(model, momentum=0.9), compression)
            train(model, optimizer, 5, lambda t: 0.05)
            x = shared(model, optimizer)
            if loads:
                model.load_state_dict(network(seed=4).state_dict())
            optimizer.load_state_dict(sgd(network(), momentum=0.9).state_dict())
            if not compression.local_models and compression.local_steps == 1:
                with optimizer.consensus():
                    expected = flat(network(seed=4)) if loads else x
                    assert torch.equal(flat(model), expected), f"{compression}, loads={loads}"
            train(model, optimizer, 6, lambda t: 0.05, first=5)
            with optimizer.consensus():
                same_everywhere(flat(model), f"after a plain state, {compression}, loads={loads}")


def check_two_optimizers_at_once() -> None:
    """As in a GAN: both backward passes, then both steps."""
    for compression in (*EXACT, *LOSSY):
        models = [network(seed=seed) for seed in (0, 1)]
        optimizers = [wrap(model, sgd(model), compression) for model in models]
        for t in range(4):
            for model, optimizer in zip(models, optimizers):
                optimizer.zero_grad()
                loss_of(model, hvd.rank(), t).backward()
            for optimizer in optimizers:
                optimizer.step()
        for model, optimizer in zip(models, optimizers):
            with optimizer.consensus():
                same_everywhere(flat(model), f"one of two models at once, {compression}")


def check_the_old_name_of_groups() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = wrap(model, sgd(model), Dense(), num_groups=4)
    train(model, optimizer, 1, lambda t: 0.1)
    assert len(optimizer._reducer.states) == 4


def check_several_ranks_refuse_graphs_of_gradients() -> None:
    for compression in (Dense(), EF(Identity()), LIEC(Identity())):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, hvd.rank(), 0)
            if hvd.size() > 1:
                raises(
                    AssertionError,
                    "create_graph=True",
                    f"rank {hvd.rank()}",
                    "autograd.grad",
                    call=lambda loss=loss: loss.backward(create_graph=True),
                )
                optimizer.set_backward_passes_per_step(1)
            else:
                loss.backward(create_graph=True)
                optimizer.step()


def check_a_model_may_be_given_to_another_optimizer() -> None:
    """Without waiting for a garbage collector."""
    gc.collect()
    gc.disable()
    try:
        for compression in (*EXACT, *LOSSY):
            model = network()
            for _ in range(3):
                optimizer = wrap(model, sgd(model), compression)
                train(model, optimizer, 3, lambda t: 0.05)
                optimizer.state_dict()
    finally:
        gc.enable()


def check_parameters_that_share_memory_are_refused() -> None:
    for compression in (DEF(BLOCK), LIEC(), DistEF()):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight.data = model[0].weight.data
        optimizer = wrap(model, sgd(model), compression)
        model(torch.ones(1, 3)).sum().backward()
        raises(ValueError, "'0.weight'", "'1.weight'", "share memory", call=optimizer.step)


def check_a_model_converted_in_the_middle_is_refused() -> None:
    for compression in (DEF(BLOCK), DistEF()):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        train(model, optimizer, 2, lambda t: 0.05)
        optimizer.zero_grad()
        model.double()

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            loss_of(model, hvd.rank(), 0).backward()
            optimizer.step()

        raises(RuntimeError, "torch.float64", "torch.float32", "before the first step", call=step)


def check_another_default_dtype() -> None:
    for compression in (*EXACT, *LOSSY):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = network()
            optimizer = wrap(model, sgd(model), compression)
            train(model, optimizer, 3, lambda t: 0.05)
            optimizer.flush()
        finally:
            torch.set_default_dtype(torch.float32)
        same_everywhere(flat(model), f"float32 where bfloat16 is the default, {compression}")


def check_a_compiled_training_step() -> None:
    for compression in (Dense(), EF(RandomBlock(0.25)), EF(TopK(0.25)), DEF(RandomBlock(0.25)), DistEF(), LIEC()):
        results = []
        for compiled in (False, True):
            model = network(torch.float64)
            optimizer = wrap(model, sgd(model, momentum=0.9), compression)

            def step(inputs: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()

            run = torch.compile(step, backend="no_compile") if compiled else step
            for t in range(4):
                run(torch.full((2, 5), 1.0 + t + hvd.rank(), dtype=torch.float64))
            results.append(flat(model))
        close(results[1], results[0], 1e-12, f"compiled, {compression}")


if __name__ == "__main__":
    harness.main(globals())
