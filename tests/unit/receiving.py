"""Shared by the tests of received payloads: how their indices may be wrong, and the loops that look."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from hvd_compress import native
from hvd_compress.native import signs, sketch

N = 50
CPU = torch.device("cpu")
# Changes of a payload's indices, which ascend, and what the error must say.
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "negative": (lambda i: i[:1].fill_(-1), "index -1 in slot 0"),
    "as long as the vector": (lambda i: i[-1:].fill_(N), f"index {N} in slot 4"),
    "huge": (lambda i: i[2:3].fill_(2**31 - 1), "TopK: index "),
    "smallest": (lambda i: i[1:2].fill_(-(2**31)), "TopK: index "),
    "duplicate": (lambda i: i[3:4].copy_(i[2:3]), "in slot 3"),
    "order": (lambda i: i.copy_(i.flip(0).clone()), "TopK: index "),
}
wrong = pytest.mark.parametrize("kind", WRONG)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the compiled loops and without."""
    if request.param and native._kernels is None:
        pytest.skip("the compiled loops are not built")
    if not request.param:
        for module, name in ((native, "_kernels"), (signs, "_signs"), (sketch, "_sketch")):
            monkeypatch.setattr(module, name, None)
    return bool(request.param)
