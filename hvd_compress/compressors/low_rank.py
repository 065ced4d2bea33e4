"""PowerSGD (Vogels, Karimireddy, Jaggi 2019): each matrix is approximated by the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from hvd_compress import validation
from hvd_compress.compressors import counter_rng, fixed_order
from hvd_compress.compressors.base import Compressor, JointCodec, Payload
from hvd_compress.compressors.counter_rng import tensor_key
from hvd_compress.compressors.layout import Layout, pieces


@dataclass(frozen=True)
class LowRank(Compressor):
    """Rank-r approximation of every matrix by one power iteration (PowerSGD, Vogels et al. 2019, algorithm 1).

    With M (n x m) and Q (m x r): ``P = M Q``, orthonormalised; ``Q = M^T P``; M is approximated by ``P Q^T``, its
    projection on the columns of P. Ranks average P before it is orthonormalised, and Q, so that the result is
    that of their mean matrix (algorithm 2). What rank k has sent of its own matrix M_k is ``P Q_k^T`` with its own
    ``Q_k = M_k^T P``; the mean of these is ``P Q^T``. So its residual is what its own projection loses, however much
    the ranks' matrices differ. A bucket's codec starts the next step with the last Q (warm start), which is
    subspace iteration if the matrix remains the same.

    A tensor is viewed as a matrix of its first dimension by the others; dimensions of one element are left out.
    A tensor with fewer than two dimensions left, or with ``r (n + m) >= n m``, is sent whole. r is at most
    n and m.

    Args:
        rank: r >= 1.
        seed: seed of the first Q; must be the same on every rank.

    Raises:
        ValueError: if an argument is out of range.
    """

    rank: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        validation.integer("LowRank", "rank", self.rank, 1)
        validation.integer("LowRank", "seed", self.seed, 0)
        object.__setattr__(self, "rank", int(self.rank))  # one repr: ranks compare it
        object.__setattr__(self, "seed", int(self.seed))

    def factors(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return (n, m, r) of a tensor's factors P (n x r) and Q (m x r); (0, 0, 0) if it is sent whole."""
        sizes = [size for size in shape if size != 1]
        if len(sizes) < 2:
            return 0, 0, 0
        n, m = sizes[0], torch.Size(sizes[1:]).numel()
        r = min(self.rank, n, m)
        return (n, m, r) if r * (n + m) < n * m else (0, 0, 0)

    def encode(self, tensor: Tensor, name: str = "", step: int = 0) -> Payload:
        """Return P and Q one after the other, in float32 (float64 for float64 tensors), or the whole tensor unchanged.

        The power iteration starts with a Q drawn from (seed, name, step).
        """
        n, m, r = self.factors(tensor.shape)
        if not r:
            return Payload(tensor.reshape(-1).clone(), tensor.shape, tensor.dtype)
        matrix = tensor.reshape(n, m).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        start = counter_rng.nearly_normal(tensor_key(self.seed, f"{name}\0{step}"), (m, r), tensor.device)
        p = matrix @ start.to(matrix.dtype)
        fixed_order.orthonormalise(p.unsqueeze(0))
        q = matrix.t() @ p
        return Payload(torch.cat((p.reshape(-1), q.reshape(-1))), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        """Return ``P Q^T``, or the whole tensor.

        Raises:
            ValueError: if the payload is not one of a tensor of this shape and dtype.
        """
        n, m, r = self.factors(payload.shape)
        wide = torch.float64 if payload.dtype == torch.float64 else torch.float32
        numel, dtype = (r * (n + m), wide) if r else (payload.shape.numel(), payload.dtype)
        validation.payload_size("LowRank", payload.values.shape, payload.values.dtype, numel, dtype)
        if not r:
            return payload.values.to(payload.dtype).view(payload.shape)
        p, q = payload.values[: n * r].view(n, r), payload.values[n * r :].view(m, r)
        return (p @ q.t()).to(payload.dtype).view(payload.shape)

    def codec(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> LowRankCodec:
        return LowRankCodec(self, layout, dtype, device)


class _Matrix(NamedTuple):
    """Position of a tensor in the layout, and the sizes of its factors."""

    position: int
    n: int
    m: int
    r: int


class LowRankCodec(JointCodec):
    """PowerSGD of a bucket, in two rounds: all P and the tensors that are sent whole; then all Q.

    Attributes:
        numels: elements of the rounds' payloads.
        dtype: dtype of the bucket, float32 or float64; everything is computed in it.
    """

    def __init__(self, config: LowRank, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._numels = layout.numels
        matrices = [_Matrix(i, *config.factors(shape)) for i, shape in enumerate(layout.dimensions())]
        self._whole = [matrix.position for matrix in matrices if not matrix.r]
        # Factors of the same shape are neighbours, so that one batched operation works on all of them.
        self._by_p = sorted((x for x in matrices if x.r), key=lambda x: (x.n, x.r, x.position))
        self._by_q = sorted(self._by_p, key=lambda x: (x.m, x.r, x.position))
        self._p_runs, self._q_runs = _runs([(x.n, x.r) for x in self._by_p]), _runs([(x.m, x.r) for x in self._by_q])
        self._p_total = sum(x.n * x.r for x in self._by_p)
        self.numels = (self._p_total + sum(layout.numels[i] for i in self._whole), sum(x.m * x.r for x in self._by_q))

        # The first round as received, with orthonormalised factors; the second as this rank has sent it, and as
        # received; the Q with which the next step starts, and those with which this one has.
        self._first = torch.zeros(self.numels[0], dtype=dtype, device=device)
        self._own, self._second, self._warm, self._start = (
            torch.zeros(self.numels[1], dtype=dtype, device=device) for _ in range(4)
        )
        keys = [tensor_key(config.seed, layout.names[x.position]) for x in self._by_q]
        drawn = [counter_rng.nearly_normal(key, (x.m, x.r), device).view(-1) for key, x in zip(keys, self._by_q)]
        self._cold = torch.cat(drawn).to(dtype) if drawn else self._second.clone()
        for batch in _batches(self._cold, self._q_runs):
            batch.div_(batch.abs().amax(dim=1, keepdim=True))
        self._p, self._own_q, self._q = self._ps(self._first), self._qs(self._own), self._qs(self._second)
        self._warm_q, self._start_q = self._qs(self._warm), self._qs(self._start)
        self.reset()

    def reset(self) -> None:
        """Discard the warm start, so that the next step starts with the Q drawn from (seed, name)."""
        self._warm.copy_(self._cold)

    def encode(self, index: int, flat: Tensor, payload: Tensor) -> None:
        parts = pieces(flat, self._numels)
        if index == 0:
            self._choose_start()
            for i, p in self._ps(payload).items():
                torch.mm(parts[i].view(len(p), -1), self._start_q[i], out=p)
            if self._whole:
                torch.cat([parts[i] for i in self._whole], out=payload[self._p_total :])
        else:
            for i, q in self._qs(payload).items():
                torch.mm(parts[i].view(-1, len(q)).t(), self._p[i], out=q)
            self._own.copy_(payload)

    def receive(self, index: int, payload: Tensor) -> None:
        """Accept the mean over ranks and orthonormalise P: the same bits on every rank, before and after.

        Where P has a lower rank than it has columns, some of them become zero instead of rounding noise.
        """
        if index:
            self._second.copy_(payload)
            return
        self._first.copy_(payload)
        for batch in _batches(self._first, self._p_runs):
            fixed_order.orthonormalise(batch)

    def subtract_sent(self, flat: Tensor) -> None:
        """Subtract ``P Q_k^T``, with this rank's own Q_k; tensors that are sent whole become zero."""
        parts = pieces(flat, self._numels)
        for i, p in self._p.items():
            q = self._own_q[i]
            parts[i].view(len(p), len(q)).addmm_(p, q.t(), alpha=-1.0)
        if self._whole:
            torch._foreach_zero_([parts[i] for i in self._whole])

    def accumulate(self, flat: Tensor, alpha: float) -> None:
        parts = pieces(flat, self._numels)
        for i, p in self._p.items():
            q = self._q[i]
            fixed_order.add_product(parts[i].view(len(p), len(q)), p, q, alpha)
        if self._whole:
            received = pieces(self._first[self._p_total :], [self._numels[i] for i in self._whole])
            torch._foreach_add_([parts[i] for i in self._whole], list(received), alpha=alpha)

    def commit(self) -> None:
        self._warm.copy_(self._second)

    def warm_start(self) -> dict[str, list[Tensor]]:
        """Return ``{"warm": [Q (m x r) of each tensor]}``, as views that may be written.

        A tensor that is sent whole has no elements there.
        """
        nothing = self._warm[:0]
        return {"warm": [self._warm_q.get(i, nothing) for i in range(len(self._numels))]}

    def _choose_start(self) -> None:
        """Start from the last Q, its columns scaled to a largest element of 1, or drawn where zero or not finite.

        The columns of P then span the same space, but have the magnitude of M and not of its square, which may be
        out of range. Zero columns would remain zero for ever, so the drawn ones take their place.
        """
        batches = (_batches(values, self._q_runs) for values in (self._warm, self._cold, self._start))
        for last, cold, start in zip(*batches):
            size = last.abs().amax(dim=1, keepdim=True)
            start.copy_(torch.where((size > 0) & (size < float("inf")), last / size, cold))

    def _ps(self, payload: Tensor) -> dict[int, Tensor]:
        """Return views of every P in a payload of the first round, by position in the layout."""
        parts = pieces(payload[: self._p_total], [x.n * x.r for x in self._by_p])
        return {x.position: part.view(x.n, x.r) for x, part in zip(self._by_p, parts)}

    def _qs(self, payload: Tensor) -> dict[int, Tensor]:
        """Return views of every Q in a payload of the second round, by position in the layout."""
        parts = pieces(payload, [x.m * x.r for x in self._by_q])
        return {x.position: part.view(x.m, x.r) for x, part in zip(self._by_q, parts)}


def _runs(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (number, rows, columns) of each run of equal shapes."""
    runs: list[tuple[int, int, int]] = []
    for shape in shapes:
        if runs and runs[-1][1:] == shape:
            runs[-1] = (runs[-1][0] + 1, *shape)
        else:
            runs.append((1, *shape))
    return runs


def _batches(flat: Tensor, runs: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Return one view (number, rows, columns) per run of the first elements of ``flat``."""
    length = sum(k * a * b for k, a, b in runs)
    return [part.view(run) for part, run in zip(pieces(flat[:length], [k * a * b for k, a, b in runs]), runs)]
