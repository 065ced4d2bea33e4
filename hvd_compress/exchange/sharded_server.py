"""Two-way compression with a server that is spread over the ranks, so that none of them is a bottleneck.

Every rank is the server of one shard of the bucket. Up: an alltoall brings each server the ranks' messages for
its shard. The server decodes them in rank order, averages, adds its error, compresses again. Down: an
allgather brings every rank all shards. With one bit per element that is about 2 (P-1)/P * d bits per rank.
"""

from __future__ import annotations

from typing import Optional, Sequence, cast

import torch
from torch import Tensor

from hvd_compress.bucket import Bucket, FlatBuffer
from hvd_compress.comm.communicator import Handle
from hvd_compress.compressors.base import Codec, Compressor, ShardedCodec
from hvd_compress.compressors.layout import Layout
from hvd_compress.exchange.base import Context, Exchange, require_countable
from hvd_compress.exchange.received import Inspection, corruption, require_length

SHARD = 8  # elements: shards begin where a byte of packed bits begins


def shard_borders(total: int, ranks: int) -> list[int]:
    """Return where the ranks' shards begin and end: multiples of SHARD, of almost equal length."""
    units = -(-total // SHARD)
    return [min(total, SHARD * (units * rank // ranks)) for rank in range(ranks + 1)]


class _Messages:
    """One message per shard in a single buffer of bytes, each beginning at a multiple of 8 bytes."""

    def __init__(self, codec: ShardedCodec, device: torch.device) -> None:
        self.lengths = [-(-c.numel * c.dtype.itemsize // 8) * 8 for c in codec.codecs]
        self.buffer = torch.zeros(sum(self.lengths), dtype=torch.uint8, device=device)
        self._codec = codec
        self.payloads = [self.payload_of(part, j) for j, part in enumerate(torch.split(self.buffer, self.lengths))]

    def payload_of(self, message: Tensor, index: int) -> Tensor:
        """Return the message of shard ``index`` as a payload of that shard's codec."""
        codec = self._codec.codecs[index]
        return message[: codec.numel * codec.dtype.itemsize].view(codec.dtype)


class ShardedServerExchange(Exchange):
    """Workers compress; servers of shards average and compress again, keeping the error of that.

    The server's error counts for the mean over ranks. It is replaced when the step is taken (``commit``), so that a
    step that fails or is given up loses nothing.

    Attributes:
        error: the error of this rank as the server of its shard (the paper's server error).
    """

    def __init__(self, bucket: Bucket, worker: Compressor, server: Compressor, context: Context) -> None:
        super().__init__(bucket, context)
        self._compressors = (worker, server)
        self._cut_shards()

    def _cut_shards(self) -> None:
        """Cut shards for the present number of ranks and allocate messages and errors."""
        bucket, comm = self.bucket, self.context.comm
        worker, server = self._compressors
        self._size, self._rank = comm.size, comm.rank
        self.borders = shard_borders(bucket.layout.total, self._size)
        kind = (bucket.state_dtype, bucket.device)
        self._up = worker.sharded(bucket.layout, self.borders, *kind)
        # The server draws under names of its own: with the workers' draw a random block would leave it no error.
        own = Layout(tuple(f"server/{name}" for name in bucket.layout.names), bucket.layout.numels)
        answers = [server.codec(own.cut(a, b), *kind) for a, b in zip(self.borders, self.borders[1:])]
        self._down = ShardedCodec(cast("list[Codec]", answers), self.borders)
        self._sent, self._answers = _Messages(self._up, bucket.device), _Messages(self._down, bucket.device)
        for what, messages in (("messages to servers", self._sent), ("servers' answers", self._answers)):
            require_countable(bucket, what, messages.buffer.numel())
        self._splits = torch.tensor(self._sent.lengths, dtype=torch.int32, device="cpu")
        begin, end = self.span
        self.error, self._next_error = (
            torch.zeros(end - begin, dtype=bucket.state_dtype, device=bucket.device) for _ in range(2)
        )
        self._error_factor = 1.0
        self._held: frozenset[int] = frozenset()
        self._up_inspection, self._down_inspection = (Inspection(bucket.device) for _ in range(2))
        self._problem, self._answered = "", 0  # what was wrong with the messages to this shard; bytes of its answer
        self._handle = Handle()
        self._received: tuple[Tensor, ...] = ()

    @property
    def span(self) -> tuple[int, int]:
        """Begin and end of this rank's shard in the flat vector."""
        return self.borders[self._rank], self.borders[self._rank + 1]

    def set_step(self, step: int) -> None:
        self._error_factor = 1.0
        self._up.set_step(step)
        self._down.set_step(step)

    def encode(self, flat: Tensor) -> None:
        """Form this rank's messages to the servers."""
        self._up.encode(flat, self._sent.payloads)

    def launch(self) -> None:
        self._handle = self.context.comm.alltoall_async(self._sent.buffer, self._splits, f"{self.name}.up")

    def next_round(self) -> None:
        """Wait for this shard's messages, average, add the error, compress and send the result to all."""
        me = self._rank
        start = sum(self._answers.lengths[:me])
        answer = self._answers.buffer[start : start + self._answers.lengths[me]]
        messages, self._problem = self._messages_to_me()
        if self._problem:
            # Only this rank knows. The length of its answer tells the others, and nobody makes use of any answer.
            answer = torch.zeros(answer.numel() + 1, dtype=torch.uint8, device=answer.device)
        else:
            self._answer(messages)
        self._answered = answer.numel()
        self._handle = self.context.comm.allgather_async(answer, f"{self.name}.down")

    def _messages_to_me(self) -> tuple[Sequence[Tensor], str]:
        """Wait for the payloads of this shard; return them, one per rank, and what is wrong with them."""
        received, counts = self._handle.wait()
        length, codec = self._sent.lengths[self._rank], self._up.codecs[self._rank]
        for sender, count in enumerate(counts.tolist()):
            if count != length:
                return (), f"from rank {sender} to rank {self._rank}: {count} bytes where {length} are expected"
        if not codec.numel:
            return (), ""
        rows = received.view(self._size, length)[:, : codec.numel * codec.dtype.itemsize].view(codec.dtype)
        flaw = self._up_inspection.flaw_in_rows(codec, rows)
        return rows.unbind(), f"to rank {self._rank} {flaw}" if flaw else ""

    def _answer(self, messages: Sequence[Tensor]) -> None:
        """Average the messages, add the error and form the answer of this shard."""
        me, total = self._rank, self._next_error
        torch.mul(self.error, self._error_factor, out=total)
        waiting = self._held_views(total)
        kept = [view.clone() for view in waiting]
        if waiting:
            torch._foreach_zero_(waiting)
        for message in messages:
            self._up.codecs[me].accumulate(message, total, 1.0 / self._size)
        codec, payload = self._down.codecs[me], self._answers.payloads[me]
        if payload.numel():
            codec.encode(total, payload)
            codec.subtract_sent(payload, total)
        if waiting:
            torch._foreach_copy_(waiting, kept)

    def drain(self) -> None:
        self.next_round()
        self._handle.wait()

    def wait(self) -> None:
        """Wait for all shards; from here on the exchange cannot fail any more."""
        received, comm, lengths = self._handle.wait(), self.context.comm, self._answers.lengths
        require_length(comm, self.name, received, lengths, self._answered, self._problem)
        messages = torch.split(received, lengths)
        payloads = tuple(self._answers.payload_of(message, j) for j, message in enumerate(messages))
        if flaw := self._down_inspection.flaw(self._down.codecs, payloads):
            raise corruption(comm, self.name, flaw)
        self._received = payloads

    def commit(self) -> None:
        self.error.copy_(self._next_error)

    def subtract_sent(self, residual: Tensor) -> None:
        self._up.subtract_sent(self._sent.payloads, residual)

    def add_aggregate(self, target: Tensor, alpha: float) -> None:
        self._down.accumulate(self._received, target, alpha)

    # -- the server's error ------------------------------------------------------------------------------

    def server_error(self) -> FlatBuffer:
        """Return ``error`` with one view per parameter: its part of the shard, flat."""
        begins, start = [], 0
        for numel in self.bucket.layout.numels:
            begins.append(max(start, self.span[0]) - start)
            start += numel
        return FlatBuffer(self.error, self._views(self.error), tuple(begins))

    def _views(self, shard: Tensor) -> list[Tensor]:
        """Return the part of each parameter in a vector of this rank's shard."""
        begin, end = self.span
        views, start = [], 0
        for numel in self.bucket.layout.numels:
            low, high = max(start, begin), min(start + numel, end)
            views.append(shard[low - begin : max(low, high) - begin])
            start += numel
        return views

    def _held_views(self, shard: Tensor) -> list[Tensor]:
        """Return the parts of the parameters that rest in a vector of this rank's shard."""
        return [view for i, view in enumerate(self._views(shard)) if i in self._held] if self._held else []

    def hold(self, inactive: frozenset[int]) -> None:
        self._held = inactive

    def server_pending(self) -> Tensor:
        """Return the servers' errors as a new flat vector whose mean over ranks they are.

        The mean is over the present ranks, which may be others than those the shards were cut for (elastic).
        """
        vector = torch.zeros(self.bucket.layout.total, dtype=self.bucket.state_dtype, device=self.bucket.device)
        begin, end = self.span
        vector[begin:end] = self.error
        for view in self._held_views(vector[begin:end]):
            view.zero_()
        return vector.mul_(self.context.comm.size)

    def rescale_server_error(self, factor: float) -> None:
        self._error_factor = factor

    def clear_server_error(self) -> None:
        self.server_error().clear(self._held)

    def reset(self) -> None:
        self.error.zero_()

    def reshard(self) -> Optional[Tensor]:
        comm = self.context.comm
        if (comm.size, comm.rank) == (self._size, self._rank):
            return None
        pending = self.server_pending()
        self._cut_shards()
        return pending
