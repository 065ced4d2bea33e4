"""Compiled loops over float32 vectors in the host's memory; everything else is done with torch's operations.

The extensions are optional. Without a C compiler the package installs and works, but DEF's update of the residual
takes about twice as long, and signs and count-sketches take several times as long. The environment variable
HVD_COMPRESS_NATIVE=0 disables them; with the path of a directory they are loaded from there, such as a build with
sanitizers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Callable, Optional, Sequence, TypeVar

import torch
from torch import Tensor

_CHOICE = os.environ.get("HVD_COMPRESS_NATIVE", "1")
if os.sep in _CHOICE:
    __path__.insert(0, _CHOICE)


def load(name: str) -> Any:
    """Return the compiled module ``name`` of this package, or None if it is not built or disabled."""
    if _CHOICE != "0":
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"hvd_compress.native.{name}")
    return None


_Result = TypeVar("_Result")
_kernels: Any = load("_kernels")

GRAIN = 2**18  # elements per thread; with fewer, waking the thread takes longer than it saves
_FLOAT = 4  # bytes
_pool: Optional[ThreadPoolExecutor] = None


def applies(*tensors: Tensor) -> bool:
    """Return True if the compiled loops can work on these tensors: contiguous float32 in real memory of this host."""
    return _kernels is not None and all(map(plain, tensors))


def plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Return True if ``tensor`` is contiguous, of ``dtype`` and in real memory of this host."""
    return type(tensor) is Tensor and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def fused_residual_update(
    x: Tensor, e: Tensor, z: Tensor, local_coefficient: float, coefficient: float, decay: float
) -> None:
    """Compute ``u = (x - local_coefficient * e) - z; e = decay * e + u; z = x - coefficient * e`` in one pass.

    With a coefficient of 0 the point is x itself, also where e is not finite.

    Args:
        x: shared model; this and the next two have equal length, and ``applies`` to them.
        e: residual, updated in place.
        z: local model, overwritten with the next point.
        local_coefficient: coefficient of the point where the local step began.
        coefficient: coefficient of the next point.
        decay: factor of the old residual.

    Raises:
        ValueError: if the lengths differ.
    """
    _in_slices(_kernels.fused_residual_update, (x, e, z), (local_coefficient, coefficient, decay))


def detached_point(x: Tensor, e: Tensor, coefficient: float, out: Tensor) -> None:
    """Write ``x - coefficient * e`` into ``out``; all three have equal length, and ``applies`` to them.

    Raises:
        ValueError: if the lengths differ.
    """
    _in_slices(_kernels.detached_point, (x, e, out), (coefficient,))


def add_product(target: Tensor, p: Tensor, columns: Tensor, alpha: float) -> None:
    """Add ``alpha * p @ columns`` to ``target``, each element's terms in the order of the rows of ``columns``.

    Args:
        target: (n, m); ``applies`` to all three.
        p: (n, r).
        columns: (r, m).
        alpha: factor of the product.

    Raises:
        ValueError: if the shapes do not match.
    """
    (n, r), m = p.shape, target.shape[1]
    if target.shape[0] != n or columns.shape != (r, m):
        raise ValueError(f"shapes do not match: {tuple(target.shape)}, {tuple(p.shape)}, {tuple(columns.shape)}")
    out, left, right = target.data_ptr(), p.data_ptr(), columns.data_ptr()
    run(
        [
            partial(_kernels.add_product, out + a * m * _FLOAT, left + a * r * _FLOAT, right, b - a, m, r, alpha)
            for a, b in bounds(n, threads(n * m, n))
        ]
    )


def digest(vector: Tensor) -> int:
    """Return the sum of the bits of elements, each times an odd number that depends on its place, as int64.

    Args:
        vector: ``applies`` to it.
    """
    address, n = vector.data_ptr(), vector.numel()
    slices = bounds(n, threads(n, n))
    found: list[int] = run([partial(_kernels.digest, address + a * _FLOAT, b - a, a) for a, b in slices])
    total = sum(found) % 2**64
    return total - 2**64 if total >= 2**63 else total


def all_finite(vector: Tensor) -> bool:
    """Return whether no element of ``vector``, which ``applies`` to it, is an infinity or nan."""
    address, n = vector.data_ptr(), vector.numel()
    return all(run([partial(_kernels.all_finite, address + a * _FLOAT, b - a) for a, b in bounds(n, threads(n, n))]))


def threads(work: int, parts: int) -> int:
    """Return how many threads to use for ``work`` elements in at most ``parts`` slices, within torch's limit."""
    return max(1, min(torch.get_num_threads(), work // GRAIN, parts))


def run(jobs: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Run all jobs, in threads if there are several, and return their results; jobs release the GIL."""
    global _pool
    if len(jobs) == 1:
        return [jobs[0]()]
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="hvd_compress")
    futures = [_pool.submit(job) for job in jobs]
    wait(futures)
    return [future.result() for future in futures]


def bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Return the (begin, end) of ``parts`` consecutive slices of [0, length) of about the same size."""
    return [(k * length // parts, (k + 1) * length // parts) for k in range(parts)]


def _in_slices(kernel: Callable[..., None], vectors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
    """Run ``kernel`` on slices of the vectors, one per thread worth using."""
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
