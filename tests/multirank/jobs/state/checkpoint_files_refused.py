"""``hvd_compress.checkpoint``: what can't be read or saved is refused on every rank alike, before anything changes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable

import horovod.torch as hvd
import pytest
import torch
from torch import nn

import hvd_compress
from hvd_compress import DEF, EF, checkpoint
from hvd_compress.checkpoint import saving
from tests.multirank.support.algorithm_cases import BLOCK
from tests.multirank.support.assertions import raises
from tests.multirank.support.cases import cases, several_ranks
from tests.multirank.support.checkpoints import last_rank, shared_directory, unchanged
from tests.multirank.support.internals import step_count
from tests.multirank.support.networks import flat, loss_of, network
from tests.multirank.support.training import harmonic_rate, make, sgd, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


def on_rank(rank: int, action: Callable[[], Any]) -> None:
    """Run ``action`` on one rank, when all ranks are here, and let the others wait for it (collective)."""
    hvd.barrier()
    if hvd.rank() == rank:
        action()
    hvd.barrier()


def file_of(path: Path, rank: int) -> Path:
    (found,) = path.glob(f"rank-{rank:05d}-of-*.safetensors")
    return found


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@cases(damage=("truncated", "altered", "missing", "foreign", "json"))
def check_damage_is_refused_on_every_rank(damage: str) -> None:
    with shared_directory() as where:
        model, optimizer = make(DEF(BLOCK))
        for step in (1, 2):
            train(model, optimizer, 3, harmonic_rate)
            path = checkpoint.save(where, model, optimizer, step=step)
        damaged = file_of(path, last_rank()) if damage != "json" else path / "checkpoint.json"
        actions: dict[str, Callable[[], Any]] = {
            "truncated": lambda: damaged.write_bytes(damaged.read_bytes()[:-1]),
            "altered": lambda: flip_a_bit(damaged),
            "missing": damaged.unlink,
            "foreign": lambda: damaged.write_bytes(damaged.read_bytes()[::-1]),
            "json": lambda: flip_a_bit(damaged),
        }
        on_rank(0, actions[damage])
        again, resumed = make(DEF(BLOCK), seed=1)
        train(again, resumed, 2, harmonic_rate)
        reader = 0 if damage == "json" else last_rank()
        fragments = (str(damaged), f"(rank {reader})", "load another checkpoint with step=, of 1")
        unchanged(
            again,
            resumed,
            lambda: raises(checkpoint.CheckpointError, *fragments, call=lambda: checkpoint.load(where, again, resumed)),
        )
        checkpoint.load(where, again, resumed, step=1)
        assert step_count(resumed) == 3


def _other_model() -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, wrap(model, sgd(model, momentum=0.9), DEF(BLOCK))


def _adam() -> tuple[Any, Any]:
    model = network()
    return model, wrap(model, torch.optim.Adam(model.parameters()), DEF(BLOCK))


def _two_groups() -> tuple[Any, Any]:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    return model, wrap(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9), DEF(BLOCK))


@cases(
    case={
        "model": (_other_model, "'0.weight' is torch.float32 of shape (7, 5) in the checkpoint"),
        "dtype": (lambda: make(DEF(BLOCK), torch.float64), "torch.float64"),
        "optimizer": (_adam, "the class of the optimizer is SGD in the checkpoint and Adam here"),
        "groups": (_two_groups, "the number of parameters in each group is [4] in the checkpoint and [2, 2] here"),
    }
)
def check_what_does_not_fit_is_refused(case: tuple[Callable[[], tuple[Any, Any]], str]) -> None:
    build, fragment = case
    with shared_directory() as where:
        model, optimizer = make(DEF(BLOCK))
        train(model, optimizer, 3, harmonic_rate)
        checkpoint.save(where, model, optimizer)
        other, others = build()
        before = flat(other)
        raises(checkpoint.CheckpointError, fragment, call=lambda: checkpoint.load(where, other, others))
        assert torch.equal(flat(other), before)
        assert not others.state


@several_ranks
def check_what_cannot_be_saved_on_one_rank_is_refused_on_all() -> None:
    model, optimizer = make(EF(BLOCK))
    extra = {"sampler": [object()]} if hvd.rank() == last_rank() else {"sampler": [1]}
    with shared_directory() as where:
        call = lambda: checkpoint.save(where / "new", model, optimizer, extra=extra)  # noqa: E731
        raises(TypeError, "extra/sampler/0 is a builtins.object", f"(rank {last_rank()})", call=call)
        assert not (where / "new").exists(), "something was written"


@several_ranks
def check_arguments_that_differ_are_refused() -> None:
    model, optimizer = make(EF(BLOCK))
    differing: dict[str, Any] = {"step": hvd.rank(), "keep": 1 + hvd.rank(), "asynchronous": hvd.rank() > 0}
    bad: dict[str, Any] = {"step": -1, "keep": 0, "asynchronous": 1, "timeout": 0}
    with shared_directory() as where:
        for name, value in differing.items():
            with pytest.raises(ValueError, match=f"rank 0 has {name}=.* and rank 1 has {name}="):
                checkpoint.save(where, model, optimizer, **{name: value})
        for name, value in bad.items():
            given = {name: value} if hvd.rank() == last_rank() else {}
            with pytest.raises(ValueError, match=rf"save: {name}={value} is not allowed.*\(rank {last_rank()}\)"):
                checkpoint.save(where, model, optimizer, **given)
        with pytest.raises(ValueError, match="load: step=-1"):
            checkpoint.load(where, model, optimizer, step=-1)
        raises(checkpoint.CheckpointError, "no whole checkpoint", call=lambda: checkpoint.load(where, model, optimizer))


@several_ranks
def check_between_steps_only() -> None:
    model, optimizer = make(EF(BLOCK))
    loss_of(model, hvd.rank(), 0).backward()
    with shared_directory() as where:
        raises(RuntimeError, "save between loss.backward() and", call=lambda: checkpoint.save(where, model, optimizer))
        optimizer.step()
        checkpoint.save(where, model, optimizer)
        loss_of(model, hvd.rank(), 1).backward()
        raises(RuntimeError, "load between loss.backward() and", call=lambda: checkpoint.load(where, model, optimizer))
    optimizer.step()


def check_other_optimizers_are_refused() -> None:
    model = network()
    adasum = hvd_compress.DistributedOptimizer(sgd(model), model.named_parameters(), op=hvd_compress.Adasum)
    for other in (sgd(model), hvd.DistributedOptimizer(sgd(network())), adasum):
        for call in (checkpoint.save, checkpoint.load):
            with pytest.raises(TypeError, match=r"must be what hvd_compress.DistributedOptimizer has returned"):
                call("nowhere", model, other)


@several_ranks
def check_a_directory_that_is_not_shared_is_refused() -> None:
    model, optimizer = make(EF(BLOCK))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as own:
        patch.setattr(saving, "_PATIENCE", 0.3)
        call = lambda: checkpoint.save(own, model, optimizer)  # noqa: E731
        raises(checkpoint.CheckpointError, "a file system that all ranks share", "(rank 1", call=call)
