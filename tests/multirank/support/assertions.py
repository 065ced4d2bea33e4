"""Assertions about vectors, across ranks, and about errors."""

from __future__ import annotations

from typing import Any, Callable

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import Tensor


def same_everywhere(vector: Tensor, what: str) -> None:
    """Fail unless every rank has the same bits (collective)."""
    every = hvd.allgather(vector.reshape(1, -1), name=f"test.same.{what}")
    for rank in range(hvd.size()):
        assert torch.equal(every[rank], every[0]), f"{what} differs between rank 0 and rank {rank}"


def close(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """Fail unless ``actual`` equals ``expected`` up to ``tolerance``, relative to the norm of the latter."""
    wanted = expected if isinstance(expected, Tensor) else torch.from_numpy(np.asarray(expected))
    wanted = wanted.to(actual.device, torch.float64)
    difference = torch.linalg.vector_norm(actual.double() - wanted)
    error = float(difference / torch.linalg.vector_norm(wanted).clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:g} (rank {hvd.rank()})"


def raises(kind: type[BaseException], *fragments: str, call: Callable[[], Any]) -> None:
    """Fail unless ``call`` raises ``kind`` with every fragment in its message."""
    with pytest.raises(kind) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in {caught.value!s}"
