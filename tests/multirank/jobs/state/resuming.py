"""Runs resumed from their own state: bit for bit, also of policies, local steps and elastic jobs."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from horovod.torch.elastic import TorchState

from hvd_compress import DEF, EF, LIEC, CountSketch, DistEF, GlobalSketch, Policy, RandomBlock, TopK
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import close, same_everywhere
from tests.multirank.support.cases import cases, more_in_full
from tests.multirank.support.checkpoints import POINTS, resumes_exactly, through_a_file
from tests.multirank.support.internals import residuals
from tests.multirank.support.networks import flat, network
from tests.multirank.support.training import dropping_rate, harmonic_rate, make, sgd, train, virtual_iterate, wrap

RANKS = (2,)
FULL_RANKS = (1, 3, 4)
MPI_RANKS = (2,)
# Buckets of one class, group and dtype, whose coefficients differ.
POLICIES: tuple[Any, ...] = (Policy(DEF(BLOCK), dense_dims=1), Policy(DEF(BLOCK, 1.0), patterns={"2.*": DEF(BLOCK)}))
MORE_POLICIES: tuple[Any, ...] = (
    Policy(DEF(BLOCK, "auto"), dense_dims=1),
    Policy(DEF(BLOCK), patterns={"*bias": DEF(TopK(0.5), 0.0)}),
    Policy(DEF(BLOCK, "auto"), patterns={"2.*": DEF(RandomBlock(0.5), "auto")}),
    Policy(GlobalSketch(CountSketch(columns=8, rows=3)), patterns={"2.weight": DEF(BLOCK, 1.0)}),
)


def grown(compression: Any, frozen: bool) -> tuple[Any, Any]:
    """Return a model whose second layer is trained after five steps only, in buckets of its own, and the optimizer.

    Args:
        frozen: the second layer was frozen; else it is added as a parameter group.
    """
    model = network(torch.float64)
    later = list(model[2].parameters())
    plain = torch.optim.SGD((model if frozen else model[0]).parameters(), lr=0.05, momentum=0.9)
    for p in later:
        p.requires_grad_(not frozen)
    optimizer = wrap(model, plain, compression)
    train(model, optimizer, 5, dropping_rate)
    if frozen:
        for p in later:
            p.requires_grad_()
    else:
        optimizer.add_param_group({"params": later})
    train(model, optimizer, 6, dropping_rate, first=5)
    return model, optimizer


@cases(compression=LOSSY_WITH_OPTIONS, point=POINTS)
def check_resume_is_bit_exact(compression: Any, point: str) -> None:
    resumes_exactly(lambda seed: make(compression, seed=seed), 10, 10, harmonic_rate, point)


@cases(compression=more_in_full(POLICIES, MORE_POLICIES), point=POINTS)
def check_policies_resume_exactly(compression: Any, point: str) -> None:
    resumes_exactly(lambda seed: make(compression, seed=seed), 6, 7, dropping_rate, point)


@cases(compression=(DEF(BLOCK, 0.3, local_steps=3), DEF(TopK(0.25), 1.0, local_steps=3)), steps=(6, 7, 8), point=POINTS)
def check_local_steps_resume_exactly(compression: Any, steps: int, point: str) -> None:
    resumes_exactly(lambda seed: make(compression, seed=seed), steps, 7, dropping_rate, point)


@cases(LOSSY_WITH_OPTIONS)
def check_load_into_a_running_optimizer(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 5, harmonic_rate)
    with optimizer.consensus():
        weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    point = flat(model)
    train(model, optimizer, 5, harmonic_rate, first=5)
    end = flat(model)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert torch.equal(flat(model), point), "the parameters are what they were, not x"
    train(model, optimizer, 5, harmonic_rate, first=5)
    assert torch.equal(flat(model), end), f"{compression}"


@cases(LOSSY_WITH_OPTIONS)
def check_elastic_save_restore_sync(compression: Any) -> None:
    model, optimizer = make(compression)
    state = TorchState(model=model, optimizer=optimizer, batch=0)
    state.sync()
    train(model, optimizer, 5, harmonic_rate)
    state.save()
    point, saved = flat(model), residuals(optimizer)
    train(model, optimizer, 3, harmonic_rate, first=5)
    end = flat(model)
    state.restore()
    assert torch.equal(flat(model), point)
    assert torch.equal(residuals(optimizer), saved)
    train(model, optimizer, 3, harmonic_rate, first=5)
    assert torch.equal(flat(model), end), f"restored run differs with {compression}"
    survived = residuals(optimizer)
    state.sync()
    assert torch.equal(residuals(optimizer), survived), "sync changes a survivor's residual"
    train(model, optimizer, 3, harmonic_rate, first=8)
    with optimizer.consensus():
        same_everywhere(flat(model), f"x after sync, {compression}")


@cases(
    compression=(
        DEF(BLOCK),
        DEF(BLOCK, "auto"),
        EF(BLOCK),
        EF(TopK(0.25)),
        DistEF(),
        DistEF(BLOCK),
        LIEC(BLOCK, 100),
        LIEC(),
    ),
    frozen=(False, True),
)
def check_states_load_into_other_buckets(compression: Any, frozen: bool) -> None:
    """No residual is lost if both layers are trained from the start, and the same random blocks follow."""
    model, optimizer = grown(compression, frozen)
    wanted = virtual_iterate(model, optimizer)
    saved: tuple[Any, Any] = (model, optimizer)
    for times in ("once", "twice, with no step between"):
        again = network(torch.float64, 1)
        groups = [{"params": list(part.parameters())} for part in ((again,) if frozen else (again[0], again[2]))]
        resumed = wrap(again, torch.optim.SGD(groups, lr=0.05, momentum=0.9), compression)
        again.load_state_dict(through_a_file(saved[0].state_dict()))
        resumed.load_state_dict(through_a_file(saved[1].state_dict()))
        close(virtual_iterate(again, resumed), wanted, 1e-12, f"y after loading {times}, {compression}")
        saved = (again, resumed)
    train(again, resumed, 4, dropping_rate, first=11)
    with resumed.consensus():
        same_everywhere(flat(again), f"x after resuming, {compression}")
    if compression in (DEF(BLOCK), EF(BLOCK)):
        train(model, optimizer, 4, dropping_rate, first=11)
        close(flat(again), flat(model), 1e-12, f"resumed against uninterrupted, {compression}")


@cases(EXACT, LOSSY)
def check_states_load_without_unpickling_code(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 3, lambda t: 0.05)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, 2, lambda t: 0.05, first=3)


def check_a_scheduler_of_the_wrapped_optimizer() -> None:
    """A scheduler of the wrapped optimizer sees that optimizer step and sets our learning rate."""
    model = network()
    plain = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
    optimizer = wrap(model, plain, EF(BLOCK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1, lambda t: 0.1)
        scheduler.step()
    assert abs(optimizer.param_groups[0]["lr"] - 0.01) < 1e-12
