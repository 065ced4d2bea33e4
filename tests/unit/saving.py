"""Shared by the tests of checkpoint files: a place for them, a state, and states divided as they are written."""

from __future__ import annotations

import math
from typing import Any

import torch

from hvd_compress.checkpoint import files
from hvd_compress.checkpoint.files import Place
from hvd_compress.checkpoint.structure import FlatState, flatten

PLACE = Place(step=7, rank=0, ranks=1, token="0123abcd")
DTYPES = list(files.dtype_names())
STATE = {"model": {"0.weight": torch.arange(6.0).reshape(2, 3)}, "extra": {"epoch": 3, "loss": [0.5, math.inf]}}


def flat(state: Any) -> FlatState:
    return flatten(state, DTYPES)
