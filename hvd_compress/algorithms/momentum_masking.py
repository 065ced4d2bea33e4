"""The wrapped SGD's momentum as one flat vector, for algorithms that clear it where they have sent."""

from __future__ import annotations

from typing import Callable, Optional

from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.exchange import Context

KEY = "momentum_buffer"  # torch.optim.SGD's


class FlatMomentum:
    """Momentum buffers of a bucket, moved into a contiguous vector where they go on living.

    The optimizer makes its buffers in its first step, and others after ``load_state_dict``: each use looks
    whether they are still ours.
    """

    def __init__(self, bucket: Bucket, context: Context) -> None:
        self._bucket, self._state_of = bucket, context.state_of
        self._mirror: Optional[FlatBuffer] = None

    def clear(self, clear: Callable[[Tensor], object]) -> None:
        """Let ``clear`` set coordinates of the momentum to zero, if there is any yet."""
        states = [self._state_of(p) for p in self._bucket.parameters]
        if all(state.get(KEY) is None for state in states):
            return
        if self._mirror is None:
            self._mirror = self._bucket.flat_buffer(self._bucket.dtype)
        sparse = []
        for state, view in zip(states, self._mirror.views):
            buffer = state.get(KEY)
            if buffer is None:
                view.zero_()
            elif buffer.is_sparse:
                view.copy_(buffer.to_dense())
                sparse.append((state, view, buffer.sparse_dim()))
            elif buffer.data_ptr() != view.data_ptr():
                view.copy_(buffer)
                state[KEY] = view
        clear(self._mirror.flat)
        for state, view, dimensions in sparse:  # torch adds sparse gradients to sparse momentum only (Nesterov)
            state[KEY] = view.to_sparse(dimensions)
