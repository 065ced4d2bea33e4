"""Compiled loops for CPU float32 vectors, and where they apply; torch does the rest.

The extensions are optional: without a C compiler the package installs and works, DEF's local pass then takes
about twice as long, signs and count-sketches several times. Set HVD_COMPRESS_NATIVE=0 to do without it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor


def load(name: str) -> Any:
    """The compiled module ``name`` of this package, or None if it is not compiled or not wanted."""
    if os.environ.get("HVD_COMPRESS_NATIVE", "1") != "0":
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"hvd_compress.native.{name}")
    return None


_kernels: Any = load("_kernels")

# Below this many elements per thread, waking a thread costs more than it saves.
GRAIN = 2**18
_FLOAT = 4
_pool: Optional[ThreadPoolExecutor] = None


def applies(*tensors: Tensor) -> bool:
    """Whether the compiled loops can work on these tensors: float32, contiguous, real memory of this host."""
    return _kernels is not None and all(map(plain, tensors))


def plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether ``tensor`` is a contiguous vector of ``dtype`` in real memory of this host."""
    return type(tensor) is Tensor and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def fold(x: Tensor, e: Tensor, z: Tensor, placed: float, coefficient: float, decay: float) -> None:
    """See ``algorithms.folding.Folder.fold``; all three of equal length, and ``applies`` to them."""
    _in_slices(_kernels.fold, (x, e, z), (placed, coefficient, decay))


def stand(x: Tensor, e: Tensor, coefficient: float, out: Tensor) -> None:
    """See ``algorithms.folding.stand``; all three of equal length, and ``applies`` to them."""
    _in_slices(_kernels.stand, (x, e, out), (coefficient,))


def threads(work: int, parts: int) -> int:
    """How many threads pay for ``work`` elements that can be cut in ``parts``; at most what torch may use."""
    return max(1, min(torch.get_num_threads(), work // GRAIN, parts))


def run(jobs: Sequence[Callable[[], None]]) -> None:
    """Do all jobs, in threads if there are several; they release the GIL."""
    global _pool
    if len(jobs) == 1:
        jobs[0]()
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hvd_compress")
    futures = [_pool.submit(job) for job in jobs]
    wait(futures)
    for future in futures:
        future.result()


def bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """``length`` cut in ``parts`` of about the same size."""
    return [(k * length // parts, (k + 1) * length // parts) for k in range(parts)]


def _in_slices(kernel: Callable[..., None], vectors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
    """Run ``kernel`` on as many slices as torch has threads, if the vectors are long enough."""
    n = vectors[0].numel()
    if any(v.numel() != n for v in vectors):
        raise ValueError(f"vectors of different lengths: {[v.numel() for v in vectors]}")
    addresses = [v.data_ptr() for v in vectors]
    run(
        [
            partial(kernel, *(address + a * _FLOAT for address in addresses), b - a, *numbers)
            for a, b in bounds(n, threads(n, n))
        ]
    )
