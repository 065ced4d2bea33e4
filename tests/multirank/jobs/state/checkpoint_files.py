"""``hvd_compress.checkpoint``: bitwise resume from files, and refusal on every rank alike, before anything changes."""

from __future__ import annotations

import tempfile
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import horovod.torch as hvd
import pytest
import torch
from torch import nn

import hvd_compress
from hvd_compress import DEF, EF, LIEC, Dense, TopK, checkpoint
from hvd_compress.checkpoint import background, files, saving
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import raises, same_everywhere
from tests.multirank.support.cases import cases, more_in_full, requires, several_ranks
from tests.multirank.support.internals import residuals, step_count
from tests.multirank.support.networks import device_type, flat, loss_of, network
from tests.multirank.support.training import harmonic_rate, make, sgd, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)
scales_on_cpu = requires(hasattr(torch.amp, "GradScaler"))  # torch >= 2.3


@contextmanager
def directory() -> Iterator[Path]:
    """Give a directory that all ranks share, and remove it afterwards (collective)."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(hvd.broadcast_object(own, name="test.directory"))
        hvd.barrier()


def files_of(path: Path) -> list[str]:
    """Return the names of a checkpoint's files without their tokens."""
    return sorted(f"{name.split('.')[0]}.{name.split('.')[-1]}" for name in (p.name for p in path.iterdir()))


def on_rank(rank: int, action: Callable[[], Any]) -> None:
    """Run ``action`` on one rank, when all ranks are here, and let the others wait for it (collective)."""
    hvd.barrier()
    if hvd.rank() == rank:
        action()
    hvd.barrier()


def last_rank() -> int:
    return int(hvd.size()) - 1


def file_of(path: Path, rank: int) -> Path:
    (found,) = path.glob(f"rank-{rank:05d}-of-*.safetensors")
    return found


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def unchanged(model: nn.Module, optimizer: Any, call: Callable[[], Any]) -> None:
    """Run ``call`` and fail if a parameter, residual, count or rate has changed."""
    before = flat(model), residuals(optimizer), step_count(optimizer), optimizer.param_groups[0]["lr"]
    call()
    assert torch.equal(flat(model), before[0])
    assert torch.equal(residuals(optimizer), before[1])
    assert (step_count(optimizer), optimizer.param_groups[0]["lr"]) == before[2:]


# -- resuming --------------------------------------------------------------------------------------------


@cases(
    compression=(EXACT, LOSSY_WITH_OPTIONS, DEF(TopK(0.25), 1.0, local_steps=3)),
    late=more_in_full((True,), (False,)),
)
def check_resume_is_bit_exact(compression: Any, late: bool) -> None:
    """Written at once, or while the run goes on; 8 steps end within a period of local steps."""
    steps = 8
    with directory() as where:
        model, optimizer = make(compression)
        train(model, optimizer, steps, harmonic_rate)
        saved = checkpoint.save(where, model, optimizer, extra={"rank": hvd.rank()}, asynchronous=late)
        train(model, optimizer, 7, harmonic_rate, first=steps)
        if late:
            assert isinstance(saved, checkpoint.PendingSave)
            saved.wait()
        again, resumed = make(compression, seed=1)
        assert checkpoint.load(where, again, resumed) == {"rank": hvd.rank()}
        train(again, resumed, 7, harmonic_rate, first=steps)
        assert torch.equal(flat(again), flat(model)), "parameters"
        if compression != Dense():
            assert torch.equal(residuals(resumed), residuals(optimizer)), "residuals"
        with resumed.consensus():
            same_everywhere(flat(again), "x after resuming")


class Run:
    """Training with all that a script has: batch norm, Adam, schedule, loss scaling, several passes, random noise."""

    def __init__(self, compression: Any, seed: int) -> None:
        torch.manual_seed(seed)
        head = (nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
        self.model: Any = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), *head)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plain = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.optimizer = wrap(self.model, plain, compression, backward_passes_per_step=2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [3, 8], 0.5)
        self.scaler = torch.amp.GradScaler(device_type(), init_scale=2.0**10, growth_interval=3)
        self.noise = torch.Generator(device_type()).manual_seed(seed + hvd.rank())

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(2):
                inputs = torch.randn(4, 2, 3, 3, generator=self.noise)
                loss = self.model(inputs).square().mean()
                self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()

    def extra(self) -> dict[str, Any]:
        states = {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}
        return {**states, "noise": self.noise.get_state()}

    def restore(self, extra: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(extra["scheduler"])
        self.scaler.load_state_dict(extra["scaler"])
        self.noise.set_state(extra["noise"])


@scales_on_cpu
@cases(compression=(EXACT, LOSSY_WITH_OPTIONS))
def check_a_whole_script_resumes(compression: Any) -> None:
    with directory() as where:
        run, again = Run(compression, 0), Run(compression, 1)
        run.train(5)
        checkpoint.save(where, run.model, run.optimizer, extra=run.extra())
        run.train(5)
        again.restore(checkpoint.load(where, again.model, again.optimizer))
        again.train(5)
    for (name, wanted), actual in zip(run.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(actual, wanted), name
        assert actual.stride() == wanted.stride(), name
    assert again.scaler.get_scale() == run.scaler.get_scale()
    assert torch.equal(again.noise.get_state(), run.noise.get_state())


@cases(EF(BLOCK), DEF(BLOCK), LIEC(BLOCK, 4))
def check_saving_at_a_consensus_point(compression: Any) -> None:
    """The file has the shared model then, which other programs can evaluate, and training continues to the bit."""
    with directory() as where:
        model, optimizer = make(compression)
        train(model, optimizer, 5, harmonic_rate)
        with optimizer.consensus():
            checkpoint.save(where, model, optimizer)
            again, resumed = make(compression, seed=1)
            unchanged(model, optimizer, lambda: _refused_inside_consensus(where, model, optimizer))
        train(model, optimizer, 5, harmonic_rate, first=5)
        checkpoint.load(where, again, resumed)
        train(again, resumed, 5, harmonic_rate, first=5)
        assert torch.equal(flat(again), flat(model))


def _refused_inside_consensus(where: Path, model: nn.Module, optimizer: Any) -> None:
    raises(RuntimeError, "inside optimizer.consensus", call=lambda: checkpoint.load(where, model, optimizer))


# -- what is refused ---------------------------------------------------------------------------------------


@cases(damage=("truncated", "altered", "missing", "foreign", "json"))
def check_damage_is_refused_on_every_rank(damage: str) -> None:
    with directory() as where:
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
    with directory() as where:
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
    with directory() as where:
        call = lambda: checkpoint.save(where / "new", model, optimizer, extra=extra)  # noqa: E731
        raises(TypeError, "extra/sampler/0 is a builtins.object", f"(rank {last_rank()})", call=call)
        assert not (where / "new").exists(), "something was written"


@several_ranks
def check_arguments_that_differ_are_refused() -> None:
    model, optimizer = make(EF(BLOCK))
    differing: dict[str, Any] = {"step": hvd.rank(), "keep": 1 + hvd.rank(), "asynchronous": hvd.rank() > 0}
    bad: dict[str, Any] = {"step": -1, "keep": 0, "asynchronous": 1, "timeout": 0}
    with directory() as where:
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
    with directory() as where:
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


# -- what is kept ------------------------------------------------------------------------------------------


def check_the_last_checkpoints_are_kept() -> None:
    model, optimizer = make(EF(BLOCK))
    with directory() as where:
        for step in range(4):
            train(model, optimizer, 1, harmonic_rate, first=step)
            path = checkpoint.save(where, model, optimizer, keep=2)
            assert path == where / f"step-{step + 1:08d}"
            hvd.barrier()
        assert sorted(p.name for p in where.iterdir()) == ["step-00000003", "step-00000004"]
        ranks = [f"rank-{rank:05d}-of-{hvd.size():05d}.safetensors" for rank in range(hvd.size())]
        assert files_of(where / "step-00000004") == ["checkpoint.json", *ranks]
        hvd.barrier()
        checkpoint.save(where, model, optimizer, keep=1)
        hvd.barrier()
        assert [p.name for p in where.iterdir()] == ["step-00000004"]


# -- in the background ---------------------------------------------------------------------------------------


@contextmanager
def blocked_writers(error_on: int = -1) -> Iterator[threading.Event]:
    """Let writers of the background wait for an event, and fail on one rank then."""
    event, write = threading.Event(), files.write_state

    def blocked(*args: Any) -> Any:
        assert event.wait(60)
        if hvd.rank() == error_on:
            raise OSError("No space left on device")
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_state", blocked)
        try:
            yield event
        finally:
            event.set()


@cases(EF(BLOCK), DEF(BLOCK))
def check_training_goes_on_while_a_checkpoint_is_written(compression: Any) -> None:
    model, optimizer = make(compression)
    train(model, optimizer, 4, harmonic_rate)
    then = flat(model)
    with directory() as where:
        with blocked_writers() as event:
            pending = checkpoint.save(where, model, optimizer, asynchronous=True)
            train(model, optimizer, 4, harmonic_rate, first=4)
            assert not pending.done(), "nothing can have been written yet"
            assert not torch.equal(flat(model), then)
            hvd.barrier()
            event.set()
            assert pending.wait() == where / "step-00000004"
            assert pending.done()
        again, resumed = make(compression, seed=1)
        checkpoint.load(where, again, resumed)
        assert torch.equal(flat(again), then), "the state at the time of save()"
        train(again, resumed, 4, harmonic_rate, first=4)
        assert torch.equal(flat(again), flat(model))


def check_the_next_save_and_load_wait() -> None:
    model, optimizer = make(EF(BLOCK))
    with directory() as where:
        handles = [checkpoint.save(where, model, optimizer, step=s, asynchronous=True) for s in (1, 2, 3)]
        assert handles[0].done()
        assert handles[1].done()
        checkpoint.load(where, model, optimizer, step=3)
        assert handles[2].done()


@several_ranks
@cases(by=("wait", "save", "load"))
def check_a_writers_error_is_raised_on_every_rank(by: str) -> None:
    model, optimizer = make(EF(BLOCK))
    fragments = ("step-00000002", "No space left on device", f"(rank {last_rank()})")
    with directory() as where, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.save(where, model, optimizer, step=1)
        with blocked_writers(error_on=last_rank()) as event:
            pending = checkpoint.save(where, model, optimizer, step=2, asynchronous=True)
            event.set()
            pending._thread.join()
        assert any(fragments[1] in str(w.message) for w in caught)
        if by == "wait":
            raises(checkpoint.CheckpointError, *fragments, call=pending.wait)
        elif by == "save":
            again = lambda: checkpoint.save(where, model, optimizer, step=3)  # noqa: E731
            raises(checkpoint.CheckpointError, *fragments, call=again)
            assert again() == where / "step-00000003"
            assert not (where / "step-00000002").exists()
            return
        checkpoint.load(where, model, optimizer)  # of step 1
        raises(
            checkpoint.CheckpointError, "step-00000002", call=lambda: checkpoint.load(where, model, optimizer, step=2)
        )


@several_ranks
def check_a_failure_to_write_is_raised_on_every_rank() -> None:
    model, optimizer = make(EF(BLOCK))
    with directory() as where:
        with blocked_writers(error_on=last_rank()) as event:
            event.set()
            call = lambda: checkpoint.save(where, model, optimizer)  # noqa: E731
            raises(checkpoint.CheckpointError, "OSError: No space left", f"(rank {last_rank()})", call=call)
        assert not list(where.glob("*/checkpoint.json"))


@several_ranks
def check_a_rank_that_is_not_heard_of() -> None:
    """Its note never comes, as if it had died: the others do not wait for ever, and say whom they have missed."""
    model, optimizer = make(EF(BLOCK))
    with directory() as where, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if hvd.rank() == 1:
            patch.setattr(background.FileAgreement, "_note", lambda *_: None)
        pending = checkpoint.save(where, model, optimizer, asynchronous=True, timeout=0.5)
        raises(checkpoint.CheckpointError, "nothing was heard of rank 1 for 0.5 s", "timeout=", call=pending.wait)
