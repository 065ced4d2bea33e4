"""Horovod's contract around ``step()``: closures, zero_grad, the optimizer's own hooks, a synchronize before it."""

from __future__ import annotations

import warnings
from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import flat, loss_of, network, raises, same_everywhere, sgd, train, wrap
from everything import BLOCKS, EXACT, LOSSY
from torch import nn

from hvd_compress import DEF, RandomBlock

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


def check_step_after_synchronize_warns() -> None:
    for compression in (*EXACT, *LOSSY):
        results = []
        for twice in (False, True):
            model = network()
            optimizer = wrap(model, sgd(model), compression)
            loss_of(model, hvd.rank(), 0).backward()
            if twice:
                optimizer.synchronize()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            assert twice == any("skip_synchronize" in str(w.message) for w in caught)
            results.append(flat(model))
        assert torch.equal(results[0], results[1]), "a second synchronize() must not count gradients twice"


def check_zero_grad() -> None:
    for compression in (*EXACT, *LOSSY):
        results = []
        for to_none in (True, False):
            model = network()
            optimizer = wrap(model, sgd(model, momentum=0.9), compression)
            for t in range(5):
                optimizer.zero_grad(set_to_none=to_none)
                if t:
                    assert all((p.grad is None) == to_none for p in model.parameters())
                    assert to_none or all(not p.grad.any() for p in model.parameters())
                loss_of(model, hvd.rank(), t).backward()
                if hvd.size() > 1:  # as Horovod: alone there is nothing to race with
                    raises(AssertionError, "race condition", call=optimizer.zero_grad)
                optimizer.step()
            results.append(flat(model))
        assert torch.equal(results[0], results[1]), f"set_to_none changes the result of {compression}"


def check_closures() -> None:
    for compression in (*EXACT, *LOSSY, DEF(RandomBlock(density=0.25), clip_norm=0.05)):
        results = []
        for with_closure in (False, True):
            model = network()
            optimizer = wrap(model, sgd(model, momentum=0.9), compression)
            for t in range(5):

                def closure(t: int = t, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = loss_of(model, hvd.rank(), t)
                    loss.backward()
                    return loss

                if with_closure:
                    loss = optimizer.step(closure)
                    assert loss is not None
                else:
                    closure()
                    optimizer.step()
            results.append(flat(model))
        assert torch.equal(results[0], results[1]), f"a closure changes the result of {compression}"


def check_lbfgs_closure_keeps_ranks_together() -> None:
    """A closure runs as often as a line search likes: alike on all ranks, or (updates) on each as it likes."""
    for compression in (*EXACT, *BLOCKS):
        model = network()
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=5, line_search_fn="strong_wolfe")
        optimizer = wrap(model, lbfgs, compression)
        runs = 0

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
            nonlocal runs
            runs += 1
            optimizer.zero_grad()
            loss = loss_of(model, hvd.rank(), 0)
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(3)]
        assert runs > 3
        if compression in EXACT:
            assert losses[-1] < losses[0] / 2, f"{losses} with {compression}"
        with optimizer.consensus():
            same_everywhere(flat(model), f"x with {compression}")


def check_step_hooks_fire_once() -> None:
    for compression in (*EXACT, *LOSSY):
        model = network()
        optimizer = wrap(model, sgd(model), compression)
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *a: seen.append("post"))  # noqa: B023
        train(model, optimizer, 2, lambda t: 0.1)
        assert seen == ["pre", "post"] * 2, seen


def check_post_hook_sees_the_exchanged_model() -> None:
    model = network()
    optimizer = wrap(model, sgd(model), DEF(RandomBlock(density=1.0)))
    optimizer.register_step_post_hook(lambda *a: same_everywhere(flat(model), "parameters in a post hook"))
    train(model, optimizer, 2, lambda t: 0.1)


if __name__ == "__main__":
    harness.main(globals())
