"""The k largest coordinates of the ranks' sum, merged pairwise in a tree of MPI messages (gTop-k)."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch
from torch import Tensor

from hvd_compress.bucket import Bucket
from hvd_compress.comm.mpi_tree import Array, Tree
from hvd_compress.compressors.topk import TopK, TopKCodec
from hvd_compress.exchange.base import Context, Exchange
from hvd_compress.exchange.received import corruption


class TopKTreeExchange(Exchange):
    """Every rank offers its k largest coordinates; pairs of ranks keep the k largest of their sum.

    What a merge drops stays in the residual of the rank that merged. Messages pass through host memory.
    """

    def __init__(self, bucket: Bucket, compressor: TopK, context: Context) -> None:
        super().__init__(bucket, context)
        self._codec = compressor.codec(bucket.layout, bucket.state_dtype, bucket.device)
        self._tree = Tree(context.comm)
        self._payload = torch.zeros(self._codec.numel, dtype=torch.uint8, device=bucket.device)
        self._merged = self._payload
        self._dropped: list[tuple[Tensor, Tensor]] = []

    def set_step(self, step: int) -> None:
        self._codec.set_step(step)

    def encode(self, flat: Tensor) -> None:
        self._codec.encode(flat, self._payload)

    def launch(self) -> None:
        """Leave the messages to ``next_round``: they block, and run in one order on every rank there."""

    def next_round(self) -> None:
        self._dropped = []
        merged = self._tree.reduce(self._payload.to("cpu").numpy(), self._merge)
        self._require_sound(merged)
        self._merged = torch.from_numpy(merged).to(self.bucket.device)

    def _require_sound(self, merged: Array) -> None:
        """Raise RuntimeError if the outcome cannot be used: on every rank, if one has found that on the way up."""
        comm, message = self.context.comm, torch.from_numpy(merged)
        if (sender := sender_of_mark(self._codec, message)) is not None:
            raise corruption(comm, self.name, f"from rank {sender}: its message in the tree has indices out of place")
        if (flaw := self._codec.flaw(message)) is not None:
            raise corruption(comm, self.name, f"from rank {comm.rank & (comm.rank - 1)}: {flaw}")

    def _merge(self, own: Array, other: Array, sender: int) -> Array:
        # A rank that raised here would leave others waiting, so the news goes through the tree instead of the message.
        if sender_of_mark(self._codec, torch.from_numpy(own)) is not None:
            return own
        message = torch.from_numpy(other)
        if sender_of_mark(self._codec, message) is not None:
            return other
        if self._codec.flaw(message) is not None:
            return mark(self._codec, sender)
        return self._merge_sound(own, other)

    def _merge_sound(self, own: Array, other: Array) -> Array:
        message, indices, sums = merge_messages(self._codec, own, other)
        self._dropped.append((torch.from_numpy(indices), torch.from_numpy(sums)))
        return message

    def wait(self) -> None:
        """Return at once: ``next_round`` has received the aggregate."""

    def subtract_sent(self, residual: Tensor) -> None:
        self._codec.accumulate(self._payload, residual, -1.0)
        for indices, sums in self._dropped:
            residual.index_add_(0, indices.to(residual.device), sums.to(residual.device))
        self._dropped = []

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self._codec.accumulate(self._merged, target, alpha / self.context.comm.size)


def mark(codec: TopKCodec, sender: int) -> Array:
    """Return what travels in place of a message of ``sender`` that cannot be used: no bit of its values is 0."""
    message = torch.full((codec.numel,), 255, dtype=codec.dtype, device="cpu")
    codec.unpack(message)[1].fill_(-1 - sender)
    return message.numpy()


def sender_of_mark(codec: TopKCodec, message: Tensor) -> Optional[int]:
    """Return the rank whose message could not be used, if ``message`` is a mark."""
    if not codec.k:
        return None
    values, indices = codec.unpack(message)
    if indices[0] >= 0 or (indices != indices[0]).any() or (values.view(torch.uint8) != 255).any():
        return None
    return -1 - int(indices[0])


def merge_messages(codec: TopKCodec, own: Array, other: Array) -> tuple[Array, Array, Array]:
    """Return the k largest coordinates of the sum of two messages, nan counting as infinite.

    Returns:
        Their message; coordinates (int64) and sums of what was dropped.
    """
    (a, i), (b, j) = (codec.unpack(torch.from_numpy(message)) for message in (own, other))
    indices, inverse = np.unique(torch.cat((i, j)).numpy(), return_inverse=True)
    sums = np.zeros(len(indices), dtype=a.numpy().dtype)
    np.add.at(sums, inverse, torch.cat((a, b)).numpy())
    sizes = np.where(np.isnan(sums), np.inf, np.abs(sums))
    order = np.argsort(-sizes, kind="stable")
    kept, dropped = np.sort(order[: codec.k]), order[codec.k :]
    message = torch.zeros(codec.numel, dtype=codec.dtype, device="cpu")
    values, places = codec.unpack(message)
    # There are fewer than k only where messages overlap entirely; free slots are zeros at coordinate 0.
    values[: len(kept)] = torch.from_numpy(sums[kept])
    places[: len(kept)] = torch.from_numpy(indices[kept])
    return message.numpy(), indices[dropped].astype(np.int64), sums[dropped]
