"""Checkpoints that survive a kill at any moment: the shared model once, the optimizer once per rank.

An optimizer that compresses has a residual on each rank: the part of its updates that the rank has not sent yet. A run
resumed without it would lose that part. So every rank writes `checkpoint.epochE.rankR.pt`, and only when all of these
files are on disk does rank 0 replace `checkpoint.pt`, which names E.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch


def write(content: dict[str, Any], path: Path) -> None:
    """Save ``content`` completely or, if interrupted, not at all."""
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def rank_file(directory: Path, epoch: int, rank: int) -> Path:
    """Return the path of the checkpoint that ``rank`` writes after ``epoch``."""
    return directory / f"checkpoint.epoch{epoch}.rank{rank}.pt"


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the current parameters and buffers, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def save(
    directory: Path,
    epoch: int,
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    history: list[dict[str, Any]],
) -> None:
    """Save the state after ``epoch`` epochs; ``weights`` are those of the shared model. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    mine = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    write(mine, rank_file(directory, epoch, hvd.rank()))
    hvd.barrier()
    if hvd.rank() == 0:
        content = {"epoch": epoch, "ranks": hvd.size(), "model": weights, "history": history}
        write(content, directory / "checkpoint.pt")
        for old in directory.glob("checkpoint.epoch*.rank*.pt"):
            if f".epoch{epoch}." not in old.name:
                old.unlink()


def load_model(directory: Path, model: torch.nn.Module) -> tuple[int, int, list[dict[str, Any]]]:
    """Load the shared model on rank 0 if there is one and return (epoch, ranks, history) on all ranks. Collective.

    The epoch is 0 if there is no checkpoint. The other ranks get the weights by the broadcast that every
    Horovod script does anyway.
    """
    found: tuple[int, int, list[dict[str, Any]]] = (0, hvd.size(), [])
    path = directory / "checkpoint.pt"
    if hvd.rank() == 0 and path.exists():
        content = _read(path)
        model.load_state_dict(content["model"])
        found = (content["epoch"], content["ranks"], content["history"])
    result: tuple[int, int, list[dict[str, Any]]] = hvd.broadcast_object(found, name="checkpoint.model")
    return result


def load_optimizer(
    directory: Path,
    epoch: int,
    ranks: int,
    steps_per_epoch: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
) -> None:
    """Load this rank's own momentum and residual. Call it AFTER the broadcasts, which would overwrite them by rank 0's.

    With another number of ranks than saved them, what all of those had not sent is shared out over the present ones.
    The schedule continues at the epoch, because with other ranks or batches an epoch has another number of steps.
    """
    files = [rank_file(directory, epoch, rank) for rank in range(ranks)]
    mine = _read(files[hvd.rank() if ranks == hvd.size() else 0])
    scheduler.load_state_dict(mine["scheduler"])
    if ranks != hvd.size() and "hvd_compress" in mine["optimizer"]:
        from hvd_compress import merge_states

        optimizer.load_state_dict(merge_states(_read(file)["optimizer"] for file in files))
    else:
        optimizer.load_state_dict(mine["optimizer"])  # Horovod's own has the same state on all ranks
    scheduler.last_epoch = epoch * steps_per_epoch  # the scheduler counts steps
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = base * factor(scheduler.last_epoch)
