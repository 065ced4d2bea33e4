"""GradScaler: an infinite gradient on any rank skips the step on all ranks and leaves every residual alone."""

from __future__ import annotations

from typing import Any

import harness
import horovod.torch as hvd
import torch
from common import close, flat, held, loss_of, network, same_everywhere, wrap
from everything import EXACT, LOSSY

from hvd_compress import DEF, EF, Dense, RandomBlock, TopK

RANKS = (2,)
FULL_RANKS = (1, 3)
MPI_RANKS = (2,)
ALL = (*EXACT, *LOSSY)
SCALE = 2.0**10
RECIPES = ("synchronize", "step", "unscale")


def step(model: Any, optimizer: Any, scaler: Any, t: int, recipe: str, infinite: bool = False) -> None:
    """One scaled step, by Horovod's recipe (synchronize, unscale, clip, step), or by one of torch's."""
    optimizer.zero_grad()
    loss = loss_of(model, hvd.rank(), t)
    if infinite:
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    if recipe == "synchronize":
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


def check_scaled_training_equals_unscaled() -> None:
    for compression in ALL:
        for recipe in RECIPES:
            model, plain = network(torch.float64), network(torch.float64)
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
            twin = wrap(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), compression)
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)  # grows: 2^10 .. 2^13
            for t in range(10):
                step(model, optimizer, scaler, t, recipe)
                twin.zero_grad()
                loss_of(plain, hvd.rank(), t).backward()
                twin.step()
            assert scaler.get_scale() > SCALE
            close(flat(model), flat(plain), 1e-9, f"parameters with {compression}, recipe={recipe}")
            if compression != Dense():
                close(held(optimizer) + 1, held(twin) + 1, 1e-9, "residual")


def check_clipping_of_local_gradients_sees_them_unscaled() -> None:
    """Also if the wrapped optimizer would unscale by itself."""
    for fused in (False, True):
        results = []
        for enabled in (False, True):
            model = network()
            plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
            optimizer = wrap(model, plain, DEF(TopK(0.25), 0.0, clip_norm=0.05))
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)
            for t in range(5):
                step(model, optimizer, scaler, t, recipe="step")
            results.append(flat(model) - flat(network()))
        close(results[1], results[0], 1e-3, f"distance gone, fused={fused}")


def check_overflow_on_one_rank_skips_everywhere() -> None:
    for compression in ALL:
        for recipe in RECIPES:
            model = network()
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
            for t in range(3):
                step(model, optimizer, scaler, t, recipe)
            before = flat(model)
            owed = held(optimizer) if compression != Dense() else before
            steps = optimizer.stats().steps
            step(model, optimizer, scaler, 3, recipe, infinite=hvd.rank() == hvd.size() - 1)
            assert torch.equal(flat(model), before), f"parameters moved with {compression}, recipe={recipe}"
            if compression != Dense():
                assert torch.equal(held(optimizer), owed), f"residual touched by {compression}"
            assert optimizer.stats().steps == steps
            same_everywhere(torch.tensor([scaler.get_scale()]), "loss scale")
            assert scaler.get_scale() == SCALE / 2, f"{scaler.get_scale()} with {compression}, recipe={recipe}"
            for t in range(4, 6):
                step(model, optimizer, scaler, t, recipe)
            assert torch.isfinite(flat(model)).all()
            with optimizer.consensus():
                same_everywhere(flat(model), "x")


def check_scaled_and_unscaled_steps_mix() -> None:
    for compression in (EF(RandomBlock(density=0.25)), DEF(RandomBlock(density=0.25))):
        model, plain = network(torch.float64), network(torch.float64)
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), compression)
        twin = wrap(plain, torch.optim.SGD(plain.parameters(), lr=0.05), compression)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
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


def check_ranks_outside_the_process_set_scale_on_their_own() -> None:
    if hvd.size() == 1:
        return  # nobody is outside
    some = hvd.add_process_set([0])
    for fused in (False, True):
        for compression in ALL:
            model, plain = network(), network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
            optimizer = wrap(model, optimizer, compression, process_set=some)
            twin = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
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
    hvd.remove_process_set(some)


if __name__ == "__main__":
    harness.main(globals())
