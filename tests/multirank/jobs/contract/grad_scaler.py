"""GradScaler: an infinite gradient on any rank skips the step on all ranks and leaves every residual unchanged."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import torch

from hvd_compress import DEF, EF, Dense, RandomBlock, TopK
from tests.multirank.support.algorithm_cases import EXACT, LOSSY
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, scales_on_cpu, several_ranks
from tests.multirank.support.internals import residuals
from tests.multirank.support.networks import device_type, flat, loss_of, network
from tests.multirank.support.training import process_set, wrap

RANKS = (2,)
FULL_RANKS = (1, 3)
MPI_RANKS = (2,)
PROCESS_SETS = True
SCALE = 2.0**10
RECIPES = ("synchronize", "step", "unscale", "by hand")


def step(model: Any, optimizer: Any, scaler: Any, t: int, recipe: str, infinite: bool = False) -> None:
    """Take a scaled step, by Horovod's recipe (synchronize, unscale, clip, step), or by one of torch's.

    By hand: gradients are taken by torch.autograd.grad, so that no hook of a parameter sees them.
    """
    optimizer.zero_grad()
    loss = loss_of(model, hvd.rank(), t)
    if infinite:
        loss = loss * float("inf")
    if recipe == "by hand":
        parameters = list(model.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(scaler.scale(loss), parameters)):
            p.grad = gradient
    else:
        scaler.scale(loss).backward()
    if recipe in ("synchronize", "by hand"):
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
    else:
        if recipe == "unscale":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        scaler.step(optimizer)
    scaler.update()


@scales_on_cpu
@cases(compression=(EXACT, LOSSY), recipe=RECIPES)
def check_scaled_training_equals_unscaled(compression: Any, recipe: str) -> None:
    model, plain = network(torch.float64), network(torch.float64)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
    twin = wrap(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), compression)
    scaler = torch.amp.GradScaler(device_type(), init_scale=SCALE, growth_interval=3)  # grows: 2^10 .. 2^13
    for t in range(10):
        step(model, optimizer, scaler, t, recipe)
        twin.zero_grad()
        loss_of(plain, hvd.rank(), t).backward()
        twin.step()
    assert scaler.get_scale() > SCALE
    close(flat(model), flat(plain), 1e-9, f"parameters with {compression}, recipe={recipe}")
    if compression != Dense():
        close(residuals(optimizer) + 1, residuals(twin) + 1, 1e-9, "residual")


@scales_on_cpu
@cases(fused=(False, True))
def check_clipping_of_local_gradients_sees_them_unscaled(fused: bool) -> None:
    """A fused optimizer would unscale by itself."""
    results = []
    for enabled in (False, True):
        model = network()
        plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        optimizer = wrap(model, plain, DEF(TopK(0.25), 0.0, clip_norm=0.05))
        scaler = torch.amp.GradScaler(device_type(), init_scale=SCALE, enabled=enabled)
        for t in range(5):
            step(model, optimizer, scaler, t, recipe="step")
        results.append(flat(model) - flat(network()))
    close(results[1], results[0], 1e-3, f"distance from the start, fused={fused}")


@scales_on_cpu
@cases(compression=(EXACT, LOSSY), recipe=RECIPES)
def check_overflow_on_one_rank_skips_everywhere(compression: Any, recipe: str) -> None:
    model = network()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
    scaler = torch.amp.GradScaler(device_type(), init_scale=SCALE)
    for t in range(3):
        step(model, optimizer, scaler, t, recipe)
    before = flat(model)
    residual = residuals(optimizer) if compression != Dense() else before
    steps = optimizer.stats().steps
    step(model, optimizer, scaler, 3, recipe, infinite=hvd.rank() == hvd.size() - 1)
    assert torch.equal(flat(model), before), f"parameters moved with {compression}, recipe={recipe}"
    if compression != Dense():
        assert torch.equal(residuals(optimizer), residual), f"residual changed by {compression}"
    assert optimizer.stats().steps == steps
    same_everywhere(torch.tensor([scaler.get_scale()]), "loss scale")
    assert scaler.get_scale() == SCALE / 2, f"{scaler.get_scale()} with {compression}, recipe={recipe}"
    for t in range(4, 6):
        step(model, optimizer, scaler, t, recipe)
    assert torch.isfinite(flat(model)).all()
    with optimizer.consensus():
        same_everywhere(flat(model), "x")


@scales_on_cpu
@cases(EF(RandomBlock(density=0.25)), DEF(RandomBlock(density=0.25)))
def check_scaled_and_unscaled_steps_mix(compression: Any) -> None:
    model, plain = network(torch.float64), network(torch.float64)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), compression)
    twin = wrap(plain, torch.optim.SGD(plain.parameters(), lr=0.05), compression)
    scaler = torch.amp.GradScaler(device_type(), init_scale=SCALE)
    for t in range(8):
        if t % 2:
            step(model, optimizer, scaler, t, recipe="synchronize")
        else:
            optimizer.zero_grad()
            loss_of(model, hvd.rank(), t).backward()
            optimizer.step()
        twin.zero_grad()
        loss_of(plain, hvd.rank(), t).backward()
        twin.step()
    close(flat(model), flat(plain), 1e-9, f"parameters with {compression}")


@scales_on_cpu
@several_ranks
@cases(compression=(EXACT, LOSSY), fused=(False, True))
def check_ranks_outside_the_process_set_scale_on_their_own(compression: Any, fused: bool) -> None:
    with process_set([0]) as some:
        model, plain = network(), network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        optimizer = wrap(model, optimizer, compression, process_set=some)
        twin = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device_type(), init_scale=SCALE)
        for t in range(4):
            infinite = t == 1
            step(model, optimizer, scaler, t, recipe="synchronize" if t == 2 else "step", infinite=infinite)
            if not infinite:
                twin.zero_grad()
                loss_of(plain, hvd.rank(), t).backward()
                twin.step()
        assert scaler.get_scale() == SCALE / 2
        if not some.included():
            close(flat(model), flat(plain), 1e-6, f"parameters outside, {compression}, fused={fused}")
