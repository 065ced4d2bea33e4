"""Zeros that need not be written again: the aggregate of a sparse payload touches few of them.

Writing a gradient's worth of zeros at every step costs as much as the rest of decoding. So the vector that
becomes ``p.grad`` is kept, and what one step has written is cleared before the next. Whoever else writes to
it is noticed: operations on ``p.grad`` by its version, dense ones on ``p.grad.data`` by samples of every
parameter. Then all of it is zeroed.
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch
from torch import Tensor

from hvd_compress.buckets import Bucket


class KeptZeros:
    """A vector of zeros of the parameters' dtype, with views like the parameters.

    Attributes:
        mirror: the vector and its views, all zeros after ``restore``.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.mirror = bucket.mirror(bucket.dtype)
        samples, begin = [], 0
        for n in bucket.layout.numels:
            samples += [begin, begin + n // 2, begin + n - 1] if n else []
            begin += n
        self._samples = torch.tensor(samples, dtype=torch.int64, device=bucket.device)
        self._version = self.mirror.flat._version
        self._cleared = True

    def clear(self, gradients: Sequence[Optional[Tensor]], clear: Callable[[Tensor], None]) -> None:
        """Clear what was written last, by ``clear(flat)``, unless the vector holds this step's gradients."""
        flat, views = self.mirror.flat, self.mirror.views
        in_use = any(g is not None and g.data_ptr() == v.data_ptr() and v.numel() for g, v in zip(gradients, views))
        if in_use or flat._version != self._version:
            self._cleared = False
            return
        clear(flat)
        self._cleared = not bool(flat.index_select(0, self._samples).any())

    def restore(self) -> list[Tensor]:
        """The views, all zeros."""
        if not self._cleared:
            self.mirror.flat.zero_()
        return self.mirror.views

    def note(self) -> None:
        """This step's aggregate has been written."""
        self._version = self.mirror.flat._version
