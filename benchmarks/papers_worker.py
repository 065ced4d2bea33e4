"""One rank of papers.py: trains (case, learning rate, seed) after (case, learning rate, seed) in one process.

Starting eight processes costs more than a short run, so a job does many.
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
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import data  # noqa: E402
from papers_cases import CASES  # noqa: E402

import hvd_compress  # noqa: E402

BATCH = 16  # of each rank


def network(seed: int) -> nn.Module:
    """20,490 parameters; no batch normalisation, whose statistics would be a question of their own."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )


def rate(lr: float, step: int, steps: int) -> float:
    """Warm-up over a twentieth of the run, a tenth of the rate after two thirds."""
    return lr * min(1.0, 20 * (step + 1) / steps) * (0.1 if 3 * step >= 2 * steps else 1.0)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Test accuracy in percent, each rank looking at its part."""
    with torch.no_grad():
        right = sum(
            float((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500))
        )
    counts = hvd.allreduce(torch.tensor([right, float(len(labels))]), op=hvd.Sum, name="papers.right")
    return float(100 * counts[0] / counts[1])


def train(name: str, lr: float, seed: int, steps: int, sets: data.Data) -> dict[str, Any]:
    """One run; the record that is kept of it."""
    case = CASES[name]
    model = network(seed)
    sgd = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=case.momentum, nesterov=case.nesterov, weight_decay=1e-4
    )
    optimizer = hvd_compress.DistributedOptimizer(sgd, model.named_parameters(), compression=case.build())
    images, labels = sets.train.tensors
    test_images, test_labels = (part[hvd.rank() :: hvd.size()] for part in sets.test.tensors)
    order = torch.Generator().manual_seed(seed)
    curve, losses, begin = [], [], time.perf_counter()
    shuffled = torch.randperm(len(labels), generator=order)
    for step in range(steps):
        whole = BATCH * hvd.size()
        at = step * whole % (len(labels) - whole)
        chosen = shuffled[at + hvd.rank() * BATCH : at + (hvd.rank() + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = rate(lr, step, steps)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 10) == 0:
            with optimizer.consensus():
                curve.append(evaluate(model, test_images, test_labels))
    stats = optimizer.stats()
    last = torch.tensor([sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])])
    loss_mean = float(hvd.allreduce(last, name="papers.loss"))
    return {
        "case": name, "lr": lr, "seed": seed, "steps": steps, "ranks": hvd.size(), "accuracy": curve[-1],
        "curve": curve, "train_loss": loss_mean if math.isfinite(loss_mean) else None,
        "bytes_per_step": stats.total_bytes_sent / steps, "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", help="JSON list of [case, learning rate, seed, steps]")
    parser.add_argument("--output", type=Path, required=True, help="a JSON line per run is added here")
    parser.add_argument("--data-dir", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    sets = data.load("fashion-mnist", args.data_dir)
    for name, lr, seed, steps in json.loads(args.runs):
        record = train(name, lr, seed, steps, sets)
        if hvd.rank() == 0:
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{name:26} lr {lr:<6g} seed {seed}  {record['accuracy']:6.2f} %  "
                  f"{record['bytes_per_step'] / 1e3:8.1f} kB/step  {record['seconds']:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
