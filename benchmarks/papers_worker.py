"""One rank of papers.py: train (case, learning rate, seed) after (case, learning rate, seed) in one process.

Starting eight processes takes longer than a short run, so one job does many runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import data  # noqa: E402

import hvd_compress  # noqa: E402
from benchmarks.papers_cases import CASES  # noqa: E402

BATCH = 16  # of each rank
VALIDATION = 5000  # images at the end of the training set, not trained on: they select the learning rate


def network(seed: int) -> nn.Module:
    """Build a network of 20,490 parameters, without batch normalisation, whose statistics would need averaging too."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


def rate(lr: float, step: int, steps: int) -> float:
    """Return the learning rate at a step: warm-up over a twentieth of the run, a tenth after two thirds."""
    return lr * min(1.0, 20 * (step + 1) / steps) * (0.1 if 3 * step >= 2 * steps else 1.0)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Compute the accuracy in percent, of which each rank evaluates a part. Collective."""
    with torch.no_grad():
        pairs = zip(torch.split(images, 500), torch.split(labels, 500))
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    counts = hvd.allreduce(torch.tensor([float(right), float(len(labels))]), op=hvd.Sum, name="papers.right")
    return float(100 * counts[0] / counts[1])


def train(name: str, lr: float, seed: int, steps: int, points: int, sets: data.Data) -> dict[str, Any]:
    """Train once, evaluating ``points`` times; return the record of the run."""
    case = CASES[name]
    model = network(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=case.momentum, nesterov=case.nesterov, weight_decay=1e-4)
    optimizer = hvd_compress.DistributedOptimizer(sgd, model.named_parameters(), compression=case.build())
    mine = slice(hvd.rank(), None, hvd.size())
    images, labels = (part[:-VALIDATION] for part in sets.train.tensors)
    validation = tuple(part[-VALIDATION:][mine] for part in sets.train.tensors)
    test = tuple(part[mine] for part in sets.test.tensors)
    order = torch.Generator().manual_seed(seed)
    whole = BATCH * hvd.size()
    curve, losses, sent, begin = [], [], 0.0, time.perf_counter()
    for step in range(steps):
        batch = step % (len(labels) // whole)
        if batch == 0:
            shuffled = torch.randperm(len(labels), generator=order)
        chosen = shuffled[batch * whole :][:whole][mine]
        for group in optimizer.param_groups:
            group["lr"] = rate(lr, step, steps)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        # Not the total, which includes the evaluation at a mean of local models.
        sent += optimizer.stats().bytes_sent
        if (step + 1) * points // steps > step * points // steps:
            with optimizer.consensus():
                curve.append([step + 1, evaluate(model, *test)])
    with optimizer.consensus():
        validation_accuracy = evaluate(model, *validation)
    tail = losses[-max(1, steps // 10) :]
    figures = hvd.allgather(torch.tensor([[sum(tail) / len(tail), sent / steps]]), name="papers.figures")
    mean_loss = float(figures[:, 0].mean())
    return {
        "case": name,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "ranks": hvd.size(),
        "accuracy": curve[-1][1],
        "validation": validation_accuracy,
        "curve": curve,
        "train_loss": mean_loss if math.isfinite(mean_loss) else None,
        "bytes_per_step": float(figures[:, 1].mean()),
        "bytes_per_step_most": float(figures[:, 1].max()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    """Do all runs of the command line; rank 0 appends a record of each to the output file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", help="JSON list of [case, learning rate, seed, steps]")
    parser.add_argument("--output", type=Path, required=True, help="file to which a JSON line per run is appended")
    parser.add_argument("--points", type=int, default=10, help="evaluations of a run")
    parser.add_argument("--data-dir", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    sets = data.load("fashion-mnist", args.data_dir)
    for name, lr, seed, steps in json.loads(args.runs):
        record = train(name, lr, seed, steps, args.points, sets)
        if hvd.rank() == 0:
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{name:34} lr {lr:<6g} seed {seed}  {record['accuracy']:6.2f} %  "
                f"{record['bytes_per_step'] / 1e3:8.1f} kB/step  {record['seconds']:6.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
