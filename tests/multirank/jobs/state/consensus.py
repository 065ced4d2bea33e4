"""``consensus()`` and ``flush()``: the shared model, the virtual iterate, and residuals emptied into the model."""

from __future__ import annotations

from functools import partial
from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, LIEC, BlockSign, Dense, DistEF, LowRank, Policy, TopK
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import close, raises, same_everywhere
from tests.multirank.support.cases import cases
from tests.multirank.support.internals import local_steps_done
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import (
    dropping_rate,
    harmonic_rate,
    make,
    sgd,
    shared_model,
    train,
    virtual_iterate,
    wrap,
)

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
GRADIENT_RESIDUALS: tuple[Any, ...] = (EF(BLOCK), EF(TopK(0.25)), EF(BlockSign()), EF(LowRank(1)), LIEC(BLOCK, 100))


def enter(optimizer: Any, point: str = "shared") -> None:
    """Enter ``consensus()`` and leave it."""
    with optimizer.consensus(point):
        pass


def fail_inside(optimizer: Any, name: str) -> None:
    """Raise KeyError at a point of ``consensus()``."""
    with optimizer.consensus(name):
        raise KeyError(name)


@cases(Dense(), LOSSY_WITH_OPTIONS)
def check_consensus(compression: Any) -> None:
    model, optimizer = make(compression)
    with optimizer.consensus():
        close(flat(model), flat(network()), 1e-7, "before the first step x is the model")
    train(model, optimizer, 4, harmonic_rate)
    point = flat(model)
    for name in ("shared", "virtual"):
        with optimizer.consensus(point=name):
            same_everywhere(flat(model), name)
            forbidden = {
                "step": (),
                "synchronize": (),
                "load_state_dict": (optimizer.state_dict(),),
                "add_param_group": ({"params": [torch.nn.Parameter(torch.ones(2))]},),
            }
            for action, args in forbidden.items():
                raises(
                    RuntimeError,
                    f"{action}() inside optimizer.consensus(",
                    call=partial(getattr(optimizer, action), *args),
                )
            raises(RuntimeError, "consensus", call=partial(enter, optimizer))
        assert torch.equal(flat(model), point), "bitwise restored"
        raises(KeyError, call=partial(fail_inside, optimizer, name))
        assert torch.equal(flat(model), point), "bitwise restored after an exception"
    raises(ValueError, "point='mine'", call=partial(enter, optimizer, "mine"))
    optimizer.zero_grad()
    loss_of(model, hvd.rank(), 4).backward()
    if hvd.size() > 1:
        raises(RuntimeError, "between loss.backward()", call=partial(enter, optimizer))
    optimizer.step()


@cases(EXACT, LOSSY_WITH_OPTIONS)
def check_an_evaluation_in_inference_mode_before_the_first_step(compression: Any) -> None:
    """All buffers are made in inference mode, and training must be able to write to them."""
    results = []
    for evaluated in (False, True):
        model, optimizer = make(compression)
        if evaluated:
            for name in ("shared", "virtual"):
                with torch.inference_mode(), optimizer.consensus(name):
                    loss_of(model, hvd.rank(), 0)
        train(model, optimizer, 4, harmonic_rate)
        with torch.inference_mode(), optimizer.consensus():
            results.append(flat(model).clone())
        with torch.inference_mode():
            optimizer.flush()
        train(model, optimizer, 2, harmonic_rate, first=4)
        with torch.inference_mode():
            optimizer.adopt_parameters()
        train(model, optimizer, 2, harmonic_rate, first=6)
    assert torch.equal(*results), f"{compression}"


@cases(LOSSY_WITH_OPTIONS)
def check_flush_adds_residuals_to_the_model(compression: Any) -> None:
    model, optimizer = make(compression, torch.float64)
    train(model, optimizer, 6, harmonic_rate)
    wanted = virtual_iterate(model, optimizer)
    optimizer.flush()
    close(flat(model), wanted, 1e-13, f"parameters with {compression}")
    same_everywhere(flat(model), "parameters")
    assert optimizer.stats().residual_norm == 0
    train(model, optimizer, 2, harmonic_rate, first=6)


def check_local_steps_move_the_virtual_iterate() -> None:
    """The virtual iterate moves by the mean of the local steps, also between exchanges; flush() loses none of them."""
    model, optimizer = make(DEF(BLOCK, 0.3, local_steps=3), torch.float64, momentum=0.0)
    for t in range(8):
        before, start = flat(model), virtual_iterate(model, optimizer)
        train(model, optimizer, 1, dropping_rate, first=t)
        if t % 3 != 2:  # an exchange moves parameters for other reasons
            moved = hvd.allreduce(flat(model) - before, name="test.moved")
            close(virtual_iterate(model, optimizer), start + moved, 1e-13, f"y after step {t}")
    wanted = virtual_iterate(model, optimizer)
    optimizer.flush()
    close(flat(model), wanted, 1e-13, "parameters after flush()")
    same_everywhere(flat(model), "parameters after flush()")
    train(model, optimizer, 2, dropping_rate, first=8)
    assert local_steps_done(optimizer) == 2, "a new cycle has begun"


@cases(compression=(EF(BLOCK), EF(BlockSign()), DEF(BLOCK), DistEF(), LIEC(averaging_period=8)), lr=(0.01, 0.3, 0.0))
def check_a_rate_set_between_steps_leaves_the_virtual_iterate(compression: Any, lr: float) -> None:
    model, optimizer = make(compression, torch.float64)
    train(model, optimizer, 6, lambda t: 0.05)
    wanted = virtual_iterate(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    close(virtual_iterate(model, optimizer), wanted, 1e-14, f"y at rate {lr} with {compression}")
    optimizer.flush()
    close(flat(model), wanted, 1e-13, f"parameters after flush() at rate {lr} with {compression}")


@cases(compression=(LOSSY, *GRADIENT_RESIDUALS), flushed=(False, True))
def check_maximizing_is_minimizing_the_negative(compression: Any, flushed: bool) -> None:
    """The virtual iterate adds pending updates then, and flush() moves parameters to it."""
    found = []
    for sign in (1.0, -1.0):
        model = network(torch.float64)
        optimizer = wrap(model, sgd(model, momentum=0.9, maximize=sign < 0), compression)
        for t in range(6):
            optimizer.zero_grad()
            (sign * loss_of(model, hvd.rank(), t)).backward()
            optimizer.step()
        if flushed:
            optimizer.flush()
        found.append(flat(model) if flushed else virtual_iterate(model, optimizer))
    close(found[1], found[0], 1e-12, f"maximize with {compression}, flushed={flushed}")


@cases(*GRADIENT_RESIDUALS, Policy(EF(BLOCK), dense_dims=1))
def check_adam_flushes_by_a_step(compression: Any) -> None:
    """Adam normalizes what is flushed: a multiple of the loss moves the parameters as far."""
    moved = []
    for scale in (1.0, 1e4):
        model = network(torch.float64)
        optimizer = wrap(model, torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30), compression)
        for t in range(5):
            optimizer.zero_grad()
            (scale * loss_of(model, hvd.rank(), t)).backward()
            optimizer.step()
        raises(
            RuntimeError,
            "point='virtual'",
            "Adam",
            f"rank {hvd.rank()}",
            call=partial(enter, optimizer, "virtual"),
        )
        before = shared_model(model, optimizer)
        gradients = [p.grad for p in model.parameters()]
        optimizer.flush()
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
        same_everywhere(flat(model), f"flushed with {compression}")
        assert optimizer.stats().residual_norm == 0.0
        moved.append(flat(model) - before)
        assert 0 < float(moved[-1].abs().max()) < 0.1, f"{compression}: {moved[-1]}"
        at = flat(model)
        optimizer.flush()  # all residuals are zero
        close(flat(model), at, 1e-14, f"flushed twice with {compression}")  # LIEC's mean of three may round
    close(moved[1], moved[0], 1e-6, f"the loss multiplied, {compression}")
