"""gTop-k: the k largest coordinates of the ranks' sum, merged pairwise in log2(P) rounds (Shi et al. 2019)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.algorithms.base import Algorithm
from hvd_compress.algorithms.bucket_state import UpdateState
from hvd_compress.algorithms.update_state import HeldUpdates
from hvd_compress.bucket import Bucket
from hvd_compress.comm import mpi_tree as mpi
from hvd_compress.comm.communicator import Communicator
from hvd_compress.compressors import TopK
from hvd_compress.compressors.topk import TopKCodec
from hvd_compress.exchange import Context


@dataclass(frozen=True)
class GlobalTopK(Algorithm):
    """Global top-k: every rank offers its k largest coordinates, pairs of ranks keep the k largest of their sum.

    With u_k what the wrapped optimizer subtracted on rank k, and T keeping k coordinates,

        p_k = e_k + u_k;   offer T(p_k);   merge(a, b) = T(a + b) up a binomial tree;   x = x - merged / P

    What is not offered stays with its rank; what a merge drops stays with the rank that merged, although the
    same coordinate may reach the root by another branch. So nothing is lost (the authors' code loses it), for
    any number of ranks. k values and int32 indices travel up and down the tree: log2(P) rounds each way.

    Args:
        density: k over the number of elements of a bucket, 0 < density <= 1.
        rescale_residual: False lets a change of learning rate change e_k in proportion.

    Raises:
        ValueError: if an argument is out of range, or (at construction of the optimizer) if the job does not
            use MPI.
    """

    exchanges_updates: ClassVar[bool] = True

    density: float = 1 / 1000
    rescale_residual: bool = True

    def __post_init__(self) -> None:
        validation.density("GlobalTopK", self.density)
        object.__setattr__(self, "density", float(self.density))  # one repr: ranks compare it
        validation.boolean("GlobalTopK", "rescale_residual", self.rescale_residual)

    def check(self, comm: Communicator) -> None:
        mpi.require("GlobalTopK", comm)

    @property
    def gathers(self) -> bool:
        return True

    def attach(self, bucket: Bucket, context: Context) -> UpdateState:
        return _GlobalTopKState(self, bucket, context)


class _GlobalTopKState(HeldUpdates):
    """The parameters hold x itself. Messages pass through host memory."""

    def __init__(self, config: GlobalTopK, bucket: Bucket, context: Context) -> None:
        super().__init__(bucket, context, config.rescale_residual)
        self._codec: TopKCodec = TopK(config.density).codec(bucket.layout, bucket.state_dtype, bucket.device)
        self._tree = mpi.Tree(context.comm)
        self._sent = torch.zeros(self._codec.numel, dtype=torch.uint8, device=bucket.device)
        self._merged = self._sent
        self._dropped: list[tuple[Tensor, Tensor]] = []

    def start(self, step: int, lr: float) -> None:
        begin = time.perf_counter()
        self.take_in(lr)
        self._codec.set_step(step)
        self._codec.encode(self.held.flat, self._sent)
        self.context.recorder.encode_seconds(time.perf_counter() - begin)

    def next_round(self) -> None:
        begin = time.perf_counter()
        self._dropped = []
        merged = self._tree.reduce(self._sent.to("cpu").numpy(), self._merge)
        self._merged = torch.from_numpy(merged).to(self.bucket.device)
        self.context.recorder.wait_seconds(time.perf_counter() - begin)

    def _merge(self, mine: mpi.Array, other: mpi.Array) -> mpi.Array:
        message, indices, sums = merged(self._codec, mine, other)
        self._dropped.append((torch.from_numpy(indices), torch.from_numpy(sums)))
        return message

    def finish(self) -> None:
        begin = time.perf_counter()
        self._codec.accumulate(self._sent, self.held.flat, -1.0)
        for indices, sums in self._dropped:
            self.held.flat.index_add_(0, indices.to(self.bucket.device), sums.to(self.bucket.device))
        self._dropped = []
        self._codec.accumulate(self._merged, self.shared.flat, -1.0 / self.context.comm.size)
        self.place()
        self.context.recorder.decode_seconds(time.perf_counter() - begin)


def merged(codec: TopKCodec, mine: mpi.Array, other: mpi.Array) -> tuple[mpi.Array, mpi.Array, mpi.Array]:
    """The k largest coordinates of the sum of two messages, nan counting as infinite.

    Returns:
        Their message; coordinates (int64) and sums of what was dropped.
    """
    (a, i), (b, j) = (codec.unpack(torch.from_numpy(message)) for message in (mine, other))
    indices, inverse = np.unique(torch.cat((i, j)).numpy(), return_inverse=True)
    sums = np.zeros(len(indices), dtype=a.numpy().dtype)
    np.add.at(sums, inverse, torch.cat((a, b)).numpy())
    sizes = np.where(np.isnan(sums), np.inf, np.abs(sums))
    order = np.argsort(-sizes, kind="stable")
    kept, dropped = np.sort(order[: codec.k]), order[codec.k :]
    message = torch.zeros(codec.numel, dtype=codec.dtype)
    values, places = codec.unpack(message)
    # Fewer than k only where messages overlap entirely; slots left over are zeros at coordinate 0.
    values[: len(kept)] = torch.from_numpy(sums[kept])
    places[: len(kept)] = torch.from_numpy(indices[kept])
    return message.numpy(), indices[dropped].astype(np.int64), sums[dropped]
