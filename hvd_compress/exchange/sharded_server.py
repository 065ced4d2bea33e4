"""Two-way compression with a server that is spread over the ranks, so that none of them is a bottleneck.

Every rank is the server of one shard of the bucket. Up: an alltoall brings each owner the ranks' messages for
its shard. The owner decodes them in rank order, averages, adds the error it holds, compresses again. Down: an
allgather brings every rank all shards. With one bit per element that is about 2 (P-1)/P * d bits per rank.
"""

from __future__ import annotations

import time
from typing import Optional, cast

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors.base import Codec, Compressor, Layout, ShardedCodec
from hvd_compress.exchange.base import Context, require_countable

SHARD = 8  # elements: shards begin where a byte of packed bits begins


def borders_of(total: int, ranks: int) -> list[int]:
    """Where the ranks' shards begin and end: multiples of SHARD, of almost equal length."""
    units = -(-total // SHARD)
    return [min(total, SHARD * (units * rank // ranks)) for rank in range(ranks + 1)]


class _Messages:
    """One message per shard in a single buffer of bytes, each beginning at a multiple of 8 bytes."""

    def __init__(self, codec: ShardedCodec, device: torch.device) -> None:
        self.lengths = [-(-c.numel * c.dtype.itemsize // 8) * 8 for c in codec.codecs]
        self.buffer = torch.zeros(sum(self.lengths), dtype=torch.uint8, device=device)
        self._codec = codec
        self.payloads = [self.typed(part, j) for j, part in enumerate(torch.split(self.buffer, self.lengths))]

    def typed(self, message: Tensor, index: int) -> Tensor:
        """The message of shard ``index`` as its codec's payload."""
        codec = self._codec.codecs[index]
        return message[: codec.numel * codec.dtype.itemsize].view(codec.dtype)


class ShardedServerExchange:
    """Workers compress, owners of shards average and compress again, holding what that loses.

    The owner's error counts for the mean over ranks. It is replaced when the step is complete (``wait``),
    so that a failed collective loses nothing.

    Attributes:
        error: what this rank holds back as the owner of its shard (the paper's server error).
    """

    def __init__(self, bucket: Bucket, worker: Compressor, server: Compressor, context: Context) -> None:
        self.bucket, self.context = bucket, context
        self._compressors = (worker, server)
        self._settle()

    def _settle(self) -> None:
        """Cut shards for the ranks there are."""
        bucket, comm = self.bucket, self.context.comm
        worker, server = self._compressors
        self._size, self._rank = comm.size, comm.rank
        self.borders = borders_of(bucket.layout.total, self._size)
        kind = (bucket.state_dtype, bucket.device)
        self._up = worker.sharded(bucket.layout, self.borders, *kind)
        # Names of its own: with the workers' draw a random block would leave the server nothing to hold.
        own = Layout(tuple(f"server/{name}" for name in bucket.layout.names), bucket.layout.numels)
        answers = [server.codec(own.cut(a, b), *kind) for a, b in zip(self.borders, self.borders[1:])]
        self._down = ShardedCodec(cast("list[Codec]", answers), self.borders)
        self._sent, self._answers = _Messages(self._up, bucket.device), _Messages(self._down, bucket.device)
        for what, messages in (("messages to servers", self._sent), ("servers' answers", self._answers)):
            require_countable(bucket, what, messages.buffer.numel())
        self._splits = torch.tensor(self._sent.lengths, dtype=torch.int32)
        begin, end = self.borders[self._rank : self._rank + 2]
        self.error, self._next_error = (
            torch.zeros(end - begin, dtype=bucket.state_dtype, device=bucket.device) for _ in range(2)
        )
        self._pending = Handle(None)
        self._received: tuple[Tensor, ...] = ()

    @property
    def span(self) -> tuple[int, int]:
        """Where this rank's shard begins and ends in the flat vector."""
        return self.borders[self._rank], self.borders[self._rank + 1]

    def error_buffer(self) -> FlatBuffer:
        """``error`` with one view per parameter: its part of the shard, flat."""
        begin, end = self.span
        views, begins, start = [], [], 0
        for numel in self.bucket.layout.numels:
            low, high = max(start, begin), min(start + numel, end)
            views.append(self.error[low - begin : max(low, high) - begin])
            begins.append(low - start)
            start += numel
        return FlatBuffer(self.error, views, tuple(begins))

    def owed(self) -> Tensor:
        """The owners' errors as a flat vector whose mean over ranks is what the servers hold back (new tensor).

        The mean is over the ranks there are now, which may be others than those the shards were cut for (elastic).
        """
        vector = torch.zeros(self.bucket.layout.total, dtype=self.bucket.state_dtype, device=self.bucket.device)
        begin, end = self.span
        vector[begin:end] = self.error
        return vector.mul_(self.context.comm.size)

    def resettle(self) -> Optional[Tensor]:
        """Cut new shards if the number of ranks has changed (elastic).

        Returns:
            What this rank held back as an owner, as a flat vector for it to hold as a worker, or None.
        """
        comm = self.context.comm
        if (comm.size, comm.rank) == (self._size, self._rank):
            return None
        owed = self.owed()
        self._settle()
        return owed

    def set_step(self, step: int) -> None:
        """Draw what step ``step`` needs; host work only."""
        self._up.set_step(step)
        self._down.set_step(step)

    def encode(self, flat: Tensor) -> None:
        """Form this rank's messages to the owners."""
        self._up.encode(flat, self._sent.payloads)

    def launch(self) -> None:
        """Send them."""
        name = f"{self.bucket.name}.up"
        self._pending = self.context.comm.alltoall_async(self._sent.buffer, self._splits, name)

    def next_round(self) -> None:
        """Wait for this shard's messages, average, add the error, compress and send the result to all."""
        begin = time.perf_counter()
        received, _ = self._pending.wait()
        arrived = time.perf_counter()
        me, total = self._rank, self._next_error
        total.copy_(self.error)
        for message in torch.split(received, self._sent.lengths[me]) if total.numel() else ():
            self._up.codecs[me].accumulate(self._sent.typed(message, me), total, 1.0 / self._size)
        codec, payload = self._down.codecs[me], self._answers.payloads[me]
        if payload.numel():
            codec.encode(total, payload)
            codec.subtract_sent(payload, total)
        start = sum(self._answers.lengths[:me])
        mine = self._answers.buffer[start : start + self._answers.lengths[me]]
        self._pending = self.context.comm.allgather_async(mine, f"{self.bucket.name}.down")
        self.context.recorder.wait_seconds(arrived - begin)
        self.context.recorder.encode_seconds(time.perf_counter() - arrived)

    def drain(self) -> None:
        """Wait for what has been launched and make no use of it."""
        self.next_round()
        self._pending.wait()

    def wait(self) -> None:
        """Wait for all shards; from here on the step cannot fail any more."""
        begin = time.perf_counter()
        messages = torch.split(self._pending.wait(), self._answers.lengths)
        self._received = tuple(self._answers.typed(message, j) for j, message in enumerate(messages))
        self.error.copy_(self._next_error)
        self.context.recorder.wait_seconds(time.perf_counter() - begin)

    def subtract_sent(self, residual: Tensor) -> None:
        """``residual -=`` what this rank has sent to the owners."""
        self._up.subtract_sent(self._sent.payloads, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        """``target += alpha *`` what the owners have sent; the same bits on every rank."""
        self._down.accumulate(self._received, target, alpha)
