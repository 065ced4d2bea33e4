"""``hvd_compress.checkpoint``: a run resumes from its files bit for bit, whatever its script has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_compress import DEF, EF, LIEC, Dense, TopK, checkpoint
from tests.multirank.support.algorithm_cases import BLOCK, EXACT, LOSSY_WITH_OPTIONS
from tests.multirank.support.assertions import raises, same_everywhere
from tests.multirank.support.cases import cases, more_in_full, scales_on_cpu
from tests.multirank.support.checkpoints import shared_directory, unchanged
from tests.multirank.support.internals import residuals
from tests.multirank.support.networks import device_type, flat
from tests.multirank.support.training import harmonic_rate, make, train, wrap

RANKS = (3,)
FULL_RANKS = (1, 2, 4)
MPI_RANKS = (2,)


def files_of(path: Path) -> list[str]:
    """Return the names of a checkpoint's files without their tokens."""
    return sorted(f"{name.split('.')[0]}.{name.split('.')[-1]}" for name in (p.name for p in path.iterdir()))


@cases(
    compression=(EXACT, LOSSY_WITH_OPTIONS, DEF(TopK(0.25), 1.0, local_steps=3)),
    late=more_in_full((True,), (False,)),
)
def check_resume_is_bit_exact(compression: Any, late: bool) -> None:
    """Written at once, or while the run goes on; 8 steps end within a period of local steps."""
    steps = 8
    with shared_directory() as where:
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
    with shared_directory() as where:
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
    with shared_directory() as where:
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


def check_the_last_checkpoints_are_kept() -> None:
    model, optimizer = make(EF(BLOCK))
    with shared_directory() as where:
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
