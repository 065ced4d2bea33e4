"""Parts that both training scripts share: device, evaluation, batch norm, bytes sent."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

MEGABYTE = 1e6


class Score(NamedTuple):
    """Mean loss and accuracy of a model on a data set."""

    loss: float
    accuracy: float  # percent


def choose_device() -> torch.device:
    """Select this rank's GPU, with TF32, or this rank's share of the CPU cores."""
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if gpus > 1 and hvd.local_size() > gpus:
            raise RuntimeError(
                f"rank {hvd.rank()}: this node has {gpus} GPUs for {hvd.local_size()} ranks; start at most {gpus} "
                "ranks on it, or set CUDA_VISIBLE_DEVICES= to train on its CPU"
            )
        # A rank that sees one GPU has been given that one by the batch system.
        torch.cuda.set_device(hvd.local_rank() if gpus > 1 else 0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        return torch.device("cuda")
    if "OMP_NUM_THREADS" in os.environ:  # set by the launcher; torch obeys it by itself
        return torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // hvd.local_size()))
    return torch.device("cpu")


def evaluation_point(optimizer: Any, point: str = "shared") -> AbstractContextManager[Any]:
    """Return a context in which the parameters are the model to evaluate and save. Collective.

    Horovod's own optimizer trains at that point already, so nothing changes there.
    """
    consensus = getattr(optimizer, "consensus", None)
    return nullcontext() if consensus is None else consensus(point=point)


def average_batch_norm(model: nn.Module) -> None:
    """Average the running statistics over ranks, each of which saw other images. Collective."""
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if statistics:
        means = hvd.grouped_allreduce(statistics, name="batch_norm", op=hvd.Average)
        for buffer, mean in zip(statistics, means):
            buffer.copy_(mean)


def mean_over_ranks(value: float, name: str) -> float:
    """Average a number over ranks. Collective."""
    return float(hvd.allreduce(torch.tensor(value, dtype=torch.float64), name=name, op=hvd.Average))


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset, device: torch.device) -> Score:
    """Compute mean loss and accuracy of the whole data set, of which each rank evaluates a part. Collective."""
    was_training = model.training
    model.eval()
    share = Subset(dataset, range(hvd.rank(), len(dataset), hvd.size()))
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in DataLoader(share, batch_size=500):
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.tensor([loss.item(), correct.item(), len(labels)], dtype=torch.float64)
    model.train(was_training)
    total_loss, total_correct, count = hvd.allreduce(sums, name="evaluate", op=hvd.Sum).tolist()
    return Score(total_loss / count, 100 * total_correct / count)


def virtual_accuracy(
    optimizer: Any, model: nn.Module, dataset: TensorDataset, device: torch.device, args: argparse.Namespace
) -> float | None:
    """With --evaluate-virtual, return the accuracy after all pending updates, at the virtual point. Collective."""
    if not getattr(args, "evaluate_virtual", False):
        return None
    with evaluation_point(optimizer, point="virtual"):
        return evaluate(model, dataset, device).accuracy


def megabytes_sent(optimizer: Any, model: nn.Module, steps: int) -> float:
    """Return the megabytes that this rank has sent in ``steps`` steps, as counted by the optimizer.

    Horovod's optimizer does not count: for it, return the volume of ring allreduces of all gradients.
    """
    stats = getattr(optimizer, "stats", None)
    if stats is not None:
        return float(stats().total_bytes_sent) / MEGABYTE
    per_step = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    size: int = hvd.size()
    return steps * per_step * 2 * (size - 1) / size / MEGABYTE
