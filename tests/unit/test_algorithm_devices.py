"""The other papers' algorithms on an accelerator, without one: see accelerator."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import pytest
import torch
from torch import Tensor

from hvd_compress import (
    DEF,
    EF,
    LIEC,
    Average,
    BlockSign,
    CountSketch,
    DistEF,
    GlobalSketch,
    Identity,
    LowRank,
    RandomBlock,
    RandomK,
    Sum,
    TopK,
    Warmup,
)
from hvd_compress.algorithms.base import BucketAlgorithm
from hvd_compress.algorithms.bucket_state import Rate
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import Bucket
from hvd_compress.comm.communicator import Handle, Reduction
from hvd_compress.exchange import Context, ShardedServerExchange
from tests.unit.accelerator import DEVICE, Uploading, uploading
from tests.unit.test_devices import StubCommunicator, bucket

__all__ = ["uploading"]  # the fixture

GATHERED = [TopK(density=0.1), TopK(density=0.1, sampled=True), BlockSign(), BlockSign(block_size=16)]
OTHERS = [RandomK(density=0.2), LowRank(rank=2), Warmup(TopK(0.1), densities=(1.0, 0.5), steps=1)]
GRADIENT_ALGORITHMS: list[BucketAlgorithm] = [
    *(EF(c) for c in (*GATHERED, *OTHERS)),
    LIEC(averaging_period=3),
    LIEC(TopK(0.2), 2),
    LIEC(Identity(), 2),
    LIEC(RandomBlock(0.25), 2, rescale_residual=False),
]
UPDATE_ALGORITHMS: list[BucketAlgorithm] = [
    *(DEF(c) for c in (*GATHERED, *OTHERS)),
    DEF(TopK(0.1), 0.0, masking=True),
    DEF(RandomBlock(0.2), masking=True),
    DEF(RandomK(0.2), masking=True),
    DistEF(),
    DistEF(TopK(0.1), BlockSign()),
    DistEF(rescale_residual=False),
    GlobalSketch(CountSketch(columns=9, rows=3)),
    GlobalSketch(CountSketch(density=1.0), "allgather", masking=False),
]
CASES = [(torch.float32, Reduction()), (torch.bfloat16, Reduction(Sum)), (torch.float64, Reduction(Average, 2.0))]
cases = pytest.mark.parametrize(("dtype", "reduction"), CASES, ids=str)


class GatheringCommunicator(StubCommunicator):
    """Also allgather and alltoall, each rank having sent the same; servers of shards answer ``answer`` bytes."""

    answer = 0

    def allgather_async(self, tensor: Tensor, name: str) -> Handle:
        self.calls.append((name, tensor.dtype, tensor.numel(), -1))
        if name.endswith(".down"):
            return Handle(result=torch.zeros(self.answer, dtype=tensor.dtype, device=tensor.device))
        return Handle(result=torch.cat([tensor] * self.size))

    def alltoall_async(self, tensor: Tensor, splits: Tensor, name: str) -> Handle:
        assert splits.dtype == torch.int32
        assert splits.device.type == "cpu"
        assert int(splits.sum()) == tensor.numel()
        self.calls.append((name, tensor.dtype, tensor.numel(), -2))
        own = torch.full_like(splits, int(splits[0]))
        return Handle(result=(torch.cat([tensor[: int(splits[0])]] * self.size), own))


def attach(
    algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction, momenta: Sequence[int] = ()
) -> tuple[Bucket, GatheringCommunicator, Any]:
    b, comm = bucket(dtype), GatheringCommunicator()
    kept: dict[Any, dict[str, Any]] = {
        b.parameters[i]: {"momentum_buffer": torch.empty_like(b.parameters[i])} for i in momenta
    }
    state: Any = algorithm.attach(
        b,
        Context(comm, reduction, lambda p: kept.setdefault(p, {})),  # type: ignore[arg-type]
    )
    exchange = getattr(state, "exchange", getattr(state, "_exchange", None))
    if isinstance(exchange, ShardedServerExchange):
        comm.answer = sum(exchange._answers.lengths)
    return b, comm, state


def stable(comm: StubCommunicator) -> None:
    """Fail unless every collective has one size, dtype and op."""
    assert len({call[0] for call in comm.calls}) == len(set(comm.calls)), comm.calls


@cases
@pytest.mark.parametrize("algorithm", GRADIENT_ALGORITHMS, ids=str)
def test_gradient_algorithms(
    uploading: Uploading, algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction
) -> None:
    b, comm, state = attach(algorithm, dtype, reduction)
    assert isinstance(state, GradientState)
    own: list[Optional[Tensor]] = [torch.empty_like(p) for p in b.parameters]
    results: list[Tensor] = []
    for step, rate in enumerate([Rate(0.1), Rate(0.01, False, 1024.0), Rate(0.0), Rate(0.1, True)]):
        choices: list[list[Optional[Tensor]]] = [own, [*results], [None] * 4, [None, own[1], *results[2:]]]
        state.start(step, choices[step], rate)
        state.next_round()
        results = state.finish()
        assert [(g.shape, g.dtype, g.device) for g in results] == [(p.shape, dtype, DEVICE) for p in b.parameters]
    stable(comm)
    assert {v.device for buffer in state.buffers().values() for v in buffer.views} == {DEVICE}
    state.residual_vector()
    state.pending_update(0.1)
    state.shared_point(comm)  # type: ignore[arg-type]
    state.clear_residual()


@cases
@pytest.mark.parametrize("algorithm", UPDATE_ALGORITHMS, ids=str)
def test_update_algorithms(
    uploading: Uploading, algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction
) -> None:
    b, comm, state = attach(algorithm, dtype, reduction, momenta=(0, 1))
    assert isinstance(state, UpdateState)
    for step, lr in enumerate((0.1, 0.1, 0.0, 0.01)):
        state.points.local.flat.mul_(0.9)
        state.start(step, lr)
        state.next_round()
        state.finish()
    stable(comm)
    assert {p.device for p in b.parameters} == {DEVICE}
    assert {v.device for buffer in state.buffers().values() for v in buffer.views} == {DEVICE}
    state.residual_vector()
    state.pending_update(0.1)
    state.points.write_local_point()
    state.reset_to(state.points.shared.flat.clone())
