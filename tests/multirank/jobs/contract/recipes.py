"""The code of docs/recipes.md, unchanged, with every kind of algorithm."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

import hvd_compress
from hvd_compress import DEF, EF, LIEC, Dense, DistEF, RandomBlock
from tests.multirank.support.assertions import same_everywhere
from tests.multirank.support.cases import SCALES_ON_CPU, cases
from tests.multirank.support.harness import ROOT
from tests.multirank.support.networks import device_type, flat
from tests.multirank.support.training import wrap

RANKS = (3,)  # two of them make a process set
PROCESS_SETS = True
PAGE = ROOT / "docs" / "recipes.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def names(compression: Any) -> dict[str, Any]:
    """Return the names that the page presupposes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), compression)
    torch.manual_seed(hvd.rank())
    directory = hvd.broadcast_object(tempfile.mkdtemp(), name="test.directory")
    return {
        "copy": copy,
        "torch": torch,
        "hvd": hvd,
        "hvd_compress": hvd_compress,
        "model": model,
        "optimizer": optimizer,
        "batches": [(torch.randn(4, 5), torch.randn(4, 3)) for _ in range(6)],
        "device": device_type(),
        "loss_function": nn.functional.mse_loss,
        "directory": Path(directory),
    }


def check_number_of_recipes() -> None:
    assert len(BLOCKS) >= 9


@cases(Dense(), EF(RandomBlock(1 / 4)), DEF(RandomBlock(1 / 4)), DistEF(), LIEC())
def check_recipes(compression: Any) -> None:
    space = names(compression)
    for block in BLOCKS:
        if "GradScaler" in block and not SCALES_ON_CPU:
            continue  # torch before 2.3 scales on CUDA only
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(block, space)
    with space["optimizer"].consensus():
        same_everywhere(flat(space["model"]), f"after the recipes, {compression}")
    hvd.remove_process_set(space["pair"])
