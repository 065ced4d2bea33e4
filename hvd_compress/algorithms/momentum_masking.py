"""Momentum factor masking (Deep Gradient Compression, section 3.2): clear the momentum where it was sent."""

from __future__ import annotations

from typing import Callable, Optional

from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.exchange import Context

KEY = "momentum_buffer"  # of torch.optim.SGD and RMSprop


class MomentumMask:
    """The wrapped optimizer's momentum buffers of a bucket, moved into one contiguous vector.

    The optimizer makes its buffers in its first step, and others after ``load_state_dict``: each use checks
    whether they are still views of this vector.
    """

    def __init__(self, bucket: Bucket, context: Context) -> None:
        self._bucket, self._optimizer_state = bucket, context.optimizer_state
        self._buffer: Optional[FlatBuffer] = None

    def clear(self, clear: Callable[[Tensor], object]) -> None:
        """Let ``clear`` set coordinates of the flat momentum to zero, if the optimizer has any momentum yet."""
        states = [self._optimizer_state(p) for p in self._bucket.parameters]
        if all(state.get(KEY) is None for state in states):
            return
        if self._buffer is None:
            self._buffer = self._bucket.flat_buffer(self._bucket.dtype)
        sparse = []
        for state, view in zip(states, self._buffer.views):
            momentum = state.get(KEY)
            if momentum is None:
                view.zero_()
            elif momentum.is_sparse:
                view.copy_(momentum.to_dense())
                sparse.append((state, view, momentum.sparse_dim()))
            elif momentum.data_ptr() != view.data_ptr():
                view.copy_(momentum)
                state[KEY] = view
        clear(self._buffer.flat)
        for state, view, dimensions in sparse:  # torch adds sparse gradients to sparse momentum only (Nesterov)
            state[KEY] = view.to_sparse(dimensions)
