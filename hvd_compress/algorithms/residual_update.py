"""One fused pass over x, e and z: the local update joins the residual, and z moves to its next point.

All three are as long as the model, so memory traffic is the cost: the vectors are cut in tiles that stay in
a processor's cache from the first operation to the last (read x, e, z; write e, z; nothing else touches
memory). On accelerators a kernel launch costs more than a pass, and the tile is the whole vector. For
float32 on CPUs the compiled loop of ``native`` does the same in one go.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from hvd_compress import native

TILE = 2**16

# On accelerators a measured coefficient stays on the device, as a tensor without dimensions.
Coefficient = Union[float, Tensor]


def detached_point(
    x: Tensor, e: Tensor, coefficient: Coefficient, out: Tensor, scratch: Optional[Tensor] = None
) -> None:
    """Write ``x - coefficient * e``, rounded to ``out``'s dtype, into ``out``.

    It is rounded after the product and after the difference, everywhere: compiled loops, CPUs and accelerators, numbers
    and tensors make the same bits, by which a state that is loaded elsewhere knows where its parameters were.

    Args:
        scratch: memory like x, needed where ``out`` has another dtype; None: new memory.
    """
    if not isinstance(coefficient, Tensor) and coefficient == 0.0:
        out.copy_(x)
    elif not isinstance(coefficient, Tensor) and native.applies(x, e, out):
        native.detached_point(x, e, coefficient, out)
    else:
        point = out if out.dtype == x.dtype else torch.empty_like(x) if scratch is None else scratch
        torch.mul(e, coefficient, out=point)
        torch.sub(x, point, out=point)
        if point is not out:
            out.copy_(point)


class ResidualUpdate:
    """The fused pass over flat vectors of equal length: x and e in float32 (or float64), z in the parameters' dtype."""

    def __init__(self, x: Tensor, e: Tensor, z: Tensor) -> None:
        self._vectors = (x, e, z)
        self._native = native.applies(x, e, z)
        tile = TILE if x.device.type == "cpu" else max(1, x.numel())
        n = min(tile, x.numel())
        update = x.new_empty(n)
        before = update if z.dtype == x.dtype else z.new_empty(n)
        parts = zip(torch.split(x, tile), torch.split(e, tile), torch.split(z, tile))
        # Of each tile: x, e, z, the update, and the point before it in z's dtype; all tiles share the last two.
        self._tiles = [(x, e, z, update[: x.numel()], before[: x.numel()]) for x, e, z in parts]

    def apply(self, placed: Coefficient, coefficient: Coefficient, factor: float = 1.0) -> None:
        """Compute ``u = (x - placed * e) - z;  e = factor * e + u;  z = x - coefficient * e``.

        ``x - placed * e`` is recomputed exactly as it was when z was placed, rounding included, so u is
        what the wrapped optimizer subtracted and nothing else.
        """
        if self._native and not isinstance(placed, Tensor) and not isinstance(coefficient, Tensor):
            native.fused_residual_update(*self._vectors, placed, coefficient, factor)
            return
        for x, e, z, update, before in self._tiles:
            detached_point(x, e, placed, before, update)
            if before.dtype != update.dtype:
                update.copy_(before)
            update.sub_(z)
            if factor != 1.0:
                e.mul_(factor)
            e.add_(update)
            detached_point(x, e, coefficient, z, update)
