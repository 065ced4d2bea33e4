"""The example scripts' checkpoints: whole after a kill, resumed to the bit, and on other numbers of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import checkpoint  # noqa: E402
import launch  # noqa: E402


def one_rank() -> SimpleNamespace:
    return SimpleNamespace(
        rank=lambda: 0, size=lambda: 1, barrier=lambda: None, broadcast_object=lambda value, name: value
    )


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write({"epoch": 1}, path)

    def interrupted(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}


def test_horovods_optimizer_continues_on_another_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    monkeypatch.setattr(checkpoint, "hvd", one_rank())
    model, optimizer, scheduler = build()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for _ in range(12):
        scheduler.step()
    checkpoint.save(tmp_path, 3, checkpoint.snapshot(model), optimizer, scheduler, [{"epoch": 3}])
    other, fresh, later = build()
    epoch, ranks, history = checkpoint.load_model(tmp_path, other)
    assert (epoch, ranks, history) == (3, 1, [{"epoch": 3}])
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    # Four steps an epoch with this rank alone, two with two: the schedule goes on at the epoch.
    monkeypatch.setattr(checkpoint.hvd, "size", lambda: 2)
    checkpoint.load_optimizer(tmp_path, epoch, ranks, 2, fresh, later)
    assert fresh.param_groups[0]["lr"] == 0.5**6
    assert len(fresh.state) == 2, "the momentum of a parameter is missing"
    later.step()
    assert fresh.param_groups[0]["lr"] == 0.5**7
    monkeypatch.setattr(checkpoint.hvd, "size", lambda: 1)
    checkpoint.load_optimizer(tmp_path, epoch, ranks, 4, fresh, later)
    assert len(fresh.state) == 2 and fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.5**12


def test_another_number_of_ranks_takes_what_all_had_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    merged: list[Any] = []
    for rank in range(3):
        state = {"optimizer": {"hvd_compress": rank}, "scheduler": scheduler.state_dict()}
        checkpoint.write(state, checkpoint.rank_file(tmp_path, 1, rank))
    monkeypatch.setattr(checkpoint, "hvd", one_rank())

    def merge_states(states: Any) -> dict[str, Any]:
        merged.extend(states)
        return optimizer.state_dict()

    monkeypatch.setattr("hvd_compress.merge_states", merge_states)
    checkpoint.load_optimizer(tmp_path, 1, 3, 2, optimizer, scheduler)
    assert merged == [{"hvd_compress": rank} for rank in range(3)]


def train(script: str, output: Path, ranks: int, *more: str) -> None:
    arguments = ["--epochs", "3", "--train-samples", "128", "--width", "4", "--output", str(output), *more]
    line = launch.command(EXAMPLES / script, arguments, ranks)
    if ranks == 1:
        line = [sys.executable, str(EXAMPLES / script), *arguments]
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # cuDNN's sums have no fixed order
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=on_cpu)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("script", "options", "ranks"),
    [
        ("train_horovod.py", [], 1),
        pytest.param("train.py", ["--compression", "dense"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "ef", "--density", "1/8"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "def", "--density", "1/8"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "dist-ef"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "liec", "--averaging-period", "5"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "gs-sgd", "--density", "1/8"], 2, marks=pytest.mark.full),
        pytest.param("train.py", ["--compression", "ef", "--compressor", "top-k"], 2, marks=pytest.mark.full),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, script: str, options: list[str], ranks: int) -> None:
    train(script, tmp_path / "whole", ranks, *options)
    train(script, tmp_path / "halves", ranks, *options, "--stop-after", "2")
    train(script, tmp_path / "halves", ranks, *options, "--resume")
    whole, halves = (torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "halves"))
    assert whole["model"].keys() == halves["model"].keys()
    for name, weights in whole["model"].items():
        assert torch.equal(weights, halves["model"][name]), name
    log = json.loads((tmp_path / "halves" / "log.json").read_text())
    assert [epoch["epoch"] for epoch in log["epochs"]] == [1, 2, 3]
    names = sorted(path.name for path in (tmp_path / "halves").iterdir())
    assert names == [*(f"checkpoint.epoch3.rank{rank}.pt" for rank in range(ranks)), "checkpoint.pt", "log.json"]


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    options = ["--compression", "def", "--density", "1/8"]
    train("train.py", tmp_path, before, *options, "--stop-after", "2")
    train("train.py", tmp_path, after, *options, "--resume")
    epochs = json.loads((tmp_path / "log.json").read_text())["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    states = [torch.load(checkpoint.rank_file(tmp_path, 3, rank))["optimizer"] for rank in range(after)]
    steps = {state["hvd_compress"]["step"] for state in states}
    assert steps == {2 * (128 // before // 16) + 128 // after // 16}
