"""The core on an accelerator, without one: no operation mixes devices, none makes the host wait."""

from __future__ import annotations

from typing import Any, Callable, Optional

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from hvd_compress import DEF, EF, Average, Cast, Compressor, Dense, Identity, RandomBlock, Sum
from hvd_compress.algorithms.base import BucketAlgorithm
from hvd_compress.algorithms.bucket_state import Rate
from hvd_compress.algorithms.gradient_state import GradientState
from hvd_compress.algorithms.residual_update import ResidualUpdate, detached_point
from hvd_compress.algorithms.update_state import UpdateState
from hvd_compress.bucket import Bucket, ParamEntry
from hvd_compress.comm.communicator import Handle, Reduction
from hvd_compress.compressors import Layout, SummableCodec
from hvd_compress.digest import digest
from hvd_compress.engine.agreement import Options
from hvd_compress.engine.gradient_reducer import GradientReducer
from hvd_compress.engine.overwritten import Overwritten, Written
from hvd_compress.engine.reducer import Reducer
from hvd_compress.engine.step_check import StepCheck, Verdict
from hvd_compress.engine.update_reducer import UpdateReducer
from hvd_compress.exchange import Context
from tests.unit.accelerator import DEVICE, Accelerator, HostWaits, accelerator

__all__ = ["accelerator"]  # the fixture

COMPRESSORS = [RandomBlock(density=0.3), RandomBlock(density=1), Identity(), Cast(), Cast(torch.float32)]


class StubCommunicator:
    """Collectives of ``size`` ranks that are complete at once; ``calls`` are (name, dtype, numel, op)."""

    member, rank = True, 0

    def __init__(self, size: int = 2) -> None:
        self.size, self.bytes_sent, self.seconds_waited = size, 0.0, 0.0
        self.calls: list[tuple[str, torch.dtype, int, int]] = []

    def allreduce_async(
        self, tensor: Tensor, name: str, op: int = Average, prescale: float = 1.0, postscale: float = 1.0
    ) -> Handle:
        assert tensor.is_contiguous()
        self.calls.append((name, tensor.dtype, tensor.numel(), op))
        self.bytes_sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()
        return Handle()

    def allreduce(self, tensor: Tensor, name: str, op: int = Average) -> Tensor:
        self.allreduce_async(tensor, name, op)
        return tensor


def bucket(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Bucket:
    """A matrix, a scalar, an empty tensor and channels_last weights."""
    tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in ((7, 5), (), (0, 3), (4, 3, 2, 2))]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    parameters = [Parameter(tensor) for tensor in tensors]
    return Bucket("bucket", [ParamEntry(p, f"p{i}", 0) for i, p in enumerate(parameters)])


# -- the harness itself --------------------------------------------------------------------------------

OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda v: v[0].item(),
    "float": lambda v: float(v.sum()),
    "bool": lambda v: bool(v.any()),
    "tolist": lambda v: v.tolist(),
    "nonzero": lambda v: v.nonzero(),
    "mask": lambda v: v[v > 0],
    "equal": lambda v: torch.equal(v, v.clone()),
    "cpu": lambda v: v.cpu(),
    "numpy": lambda v: v.numpy(),
    "copy_to_host": lambda v: torch.empty(9).copy_(v),
    "copy_from_host": lambda v: v.copy_(torch.zeros(9)),
    "from_host": lambda v: torch.zeros(9).to(v.device),
    "add": lambda v: v + torch.zeros(9),
    "host_scalar": lambda v: v.mul_(torch.tensor(2.0)),
    "host_index": lambda v: v[torch.tensor([1, 2])],
    "out": lambda v: torch.sub(torch.zeros(9), torch.zeros(9), out=v),
    "foreach_add": lambda v: torch._foreach_add_([v], [torch.zeros(9)], alpha=0.5),
    "foreach_copy": lambda v: torch._foreach_copy_([v], [torch.zeros(9)]),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_the_harness_catches(accelerator: Accelerator, offence: str) -> None:
    v = torch.zeros(9, device=DEVICE) + 1
    with pytest.raises((HostWaits, RuntimeError, TypeError), match=r"device|tensor subclasses"):
        OFFENCES[offence](v)


def test_the_harness_lets_device_work_pass(accelerator: Accelerator) -> None:
    v, w = torch.zeros(9, device=DEVICE), torch.ones(9, device=DEVICE)
    torch.sub(v, w, alpha=0.3, out=w)
    torch._foreach_add_([v[:4]], [w[:4]], alpha=2.0)
    v.copy_(w.to(torch.float16)).add_(v.square().sum())
    torch.cat((v[3:], v[:3]), out=w)
    assert accelerator.operations > 5
    assert float(torch.ones(3).sum()) == 3.0, "the host may work with its own tensors"


# -- parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_codecs(accelerator: Accelerator, compressor: Compressor, dtype: torch.dtype) -> None:
    layout = Layout(("a", "empty", "b", "c"), (40, 0, 1, 9))
    codec, flat = compressor.codec(layout, dtype, DEVICE), torch.zeros(50, dtype=dtype, device=DEVICE)
    assert isinstance(codec, SummableCodec)
    payload = torch.zeros(codec.numel, dtype=codec.dtype, device=DEVICE)
    for step in range(6):
        codec.set_step(step)
        codec.encode(flat, payload)
        codec.accumulate(payload, flat, -0.5)
        codec.subtract_sent(payload, flat)
        codec.write(payload, flat)
        codec.write_tensors(payload, torch.split(flat, list(layout.numels)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_tensors_one_by_one(accelerator: Accelerator, compressor: Compressor, dtype: torch.dtype) -> None:
    for shape in ((7, 5), (), (0, 3), (1,)):
        for step in range(4):
            decoded = compressor.decode(compressor.encode(torch.zeros(shape, dtype=dtype, device=DEVICE), "w", step))
            assert (decoded.shape, decoded.dtype, decoded.device) == (shape, dtype, DEVICE)


@pytest.mark.parametrize(
    ("state", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_residual_update(accelerator: Accelerator, state: torch.dtype, dtype: torch.dtype) -> None:
    x, e = torch.zeros(200_000, dtype=state, device=DEVICE), torch.zeros(200_000, dtype=state, device=DEVICE)
    z = torch.zeros(200_000, dtype=dtype, device=DEVICE)
    update, before = ResidualUpdate(x, e, z), accelerator.operations
    update.apply(0.3, 0.4, 0.5)
    assert accelerator.operations - before <= 10, "one pass over everything: a kernel launch costs more than a tile"
    detached_point(x, e, 0.0, z)
    detached_point(x, e, 0.5, z)
    ResidualUpdate(x[:0], e[:0], z[:0]).apply(0.3, 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_digest(accelerator: Accelerator, dtype: torch.dtype) -> None:
    for numel in (0, 1, 24, 200_000):
        total = digest(torch.zeros(numel, dtype=dtype, device=DEVICE))
        assert (total.dtype, total.shape, total.device) == (torch.int64, (), DEVICE)


# -- algorithms ----------------------------------------------------------------------------------------

CASES = [
    (torch.float32, Reduction()),
    (torch.float64, Reduction(Average, 2.0)),
    (torch.bfloat16, Reduction(Sum)),
    (torch.float16, Reduction()),
]
cases = pytest.mark.parametrize(("dtype", "reduction"), CASES, ids=str)
GRADIENT_ALGORITHMS: list[BucketAlgorithm] = [
    Dense(),
    Dense(Cast()),
    *(EF(c) for c in COMPRESSORS),
    EF(COMPRESSORS[0], rescale_residual=False),
]
UPDATE_ALGORITHMS: list[BucketAlgorithm] = [
    *(DEF(c) for c in COMPRESSORS),
    DEF(COMPRESSORS[0], coefficient=0),
    DEF(COMPRESSORS[0], coefficient=1.0),
    DEF(COMPRESSORS[0], rescale_residual=False),
    DEF(Identity(), rescale_residual=False),
]


@cases
@pytest.mark.parametrize("algorithm", GRADIENT_ALGORITHMS, ids=str)
def test_gradient_algorithms(
    accelerator: Accelerator, algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction
) -> None:
    """Steps with own gradients, with the last results, with none, with some absorbed early; rates change."""
    b, comm = bucket(dtype), StubCommunicator()
    state = algorithm.attach(b, Context(comm, reduction))  # type: ignore[arg-type]
    assert isinstance(state, GradientState)
    own: list[Optional[Tensor]] = [torch.empty_like(p) for p in b.parameters]
    results: list[Tensor] = []
    for step, rate in enumerate([Rate(0.1), Rate(0.01, False, 1024.0), Rate(0.0), Rate(0.1, True)]):
        choices: list[list[Optional[Tensor]]] = [own, [*results], [None] * 4, [None, own[1], *results[2:]]]
        gradients = choices[step]
        if step in (1, 3):
            gradients[3] = state.accumulate_grad(3, results[3], rate)
        state.start(step, gradients, rate)
        results = state.finish()
        assert [(g.shape, g.dtype, g.device) for g in results] == [(p.shape, dtype, DEVICE) for p in b.parameters]
    state.residual_vector()
    state.pending_update(0.1)
    state.clear_residual()
    assert len(comm.calls) == 4
    assert len(set(comm.calls)) == 1, "one collective per step, always of the same name, size, dtype and op"


def run_updates(algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction) -> None:
    """Steps with changing rates, then what consensus points and checkpoints do."""
    b, comm = bucket(dtype), StubCommunicator()
    state = algorithm.attach(b, Context(comm, reduction))  # type: ignore[arg-type]
    assert isinstance(state, UpdateState)
    for step, lr in enumerate((0.1, 0.1, 0.0, 0.01)):
        state.points.local.flat.mul_(0.9)
        state.start(step, lr)
        state.finish()
    state.residual_vector()
    state.points.write_local_point()
    state.points.set_shared_from_params()
    assert {p.device for p in b.parameters} == {DEVICE}
    names = {call[0] for call in comm.calls}
    assert len(comm.calls) == 4 * len(names)
    assert len(set(comm.calls)) == len(names), "a collective has the same size, dtype and op at every step"


@cases
@pytest.mark.parametrize("algorithm", UPDATE_ALGORITHMS, ids=str)
def test_update_algorithms(
    accelerator: Accelerator, algorithm: BucketAlgorithm, dtype: torch.dtype, reduction: Reduction
) -> None:
    run_updates(algorithm, dtype, reduction)


@pytest.mark.parametrize("compressor", [RandomBlock(density=0.3), Cast()], ids=str)
def test_a_measured_coefficient(accelerator: Accelerator, compressor: Compressor) -> None:
    run_updates(DEF(compressor, coefficient="auto"), torch.float32, Reduction())


@pytest.mark.parametrize("algorithm", [Dense(), EF(COMPRESSORS[0]), DEF(COMPRESSORS[0]), DEF(Cast())], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_whole_steps(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, algorithm: BucketAlgorithm, size: int
) -> None:
    """The engine that drives the states, with a torch optimizer; parameters on two devices."""
    # The verdict needs real numbers; what comes before it has a test of its own, below.
    verdict = Verdict(size, (True,), False, False, False)
    monkeypatch.setattr(StepCheck, "finish", lambda self: (self.forget(wait=False), verdict)[1])
    monkeypatch.setattr(Overwritten, "find", lambda self, points, *_: Written([], [], False))
    on_device, on_host = bucket(), bucket(device=torch.device("cpu"))
    parameters = [*on_device.parameters, *on_host.parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)
    names = {p: f"p{i}" for i, p in enumerate(parameters)}
    comm = StubCommunicator(size)
    options = Options(algorithm, Reduction(), 1, None, True)
    kind = UpdateReducer if algorithm.exchanges_updates else GradientReducer
    reducer: Reducer = kind(optimizer, names, comm, options)  # type: ignore[arg-type]
    for _ in range(3):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        reducer.synchronize()
        reducer.before_step()
        optimizer.step()
        reducer.after_step()
    assert reducer.step == 3
    assert {s.bucket.device.type for s in reducer.states} == {"cuda", "cpu"}
    whats = {name.split(".")[0] for name, *_ in comm.calls}
    looks = not isinstance(algorithm, Dense)
    assert whats == {"step_check", "bucket0"} | ({"nonfinite"} if looks else set())
    assert len(comm.calls) == (15 if looks else 9), "a check and two buckets a step, and flags of each device"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_check(accelerator: Accelerator, dtype: torch.dtype) -> None:
    """All of a step but its verdict, which the host must read: it decides what is done before the next step."""
    comm = StubCommunicator()
    check, watch = StepCheck(comm), Overwritten(comm)  # type: ignore[arg-type]
    points = [b.flat_buffer(b.dtype) for b in (bucket(), bucket(dtype))]
    for step in range(2):
        watch.record(points, step)
        check.launch([5], False, False, watch.any_written(points))
        check.forget(wait=True)
    before = accelerator.operations
    check.launch([5], False, False, watch.any_written(points))
    assert accelerator.operations - before < 60, "a few operations, however many parameters"
    assert set(comm.calls) == {("step_check", torch.float64, 10, Sum)}, "six words and four flags"
    assert digest(points[1].flat).dtype == torch.int64
    with pytest.raises(HostWaits, match="host"):  # the verdict needs real numbers
        check.finish()


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("alone", [True, False])
def test_adopting_overwritten_parameters(accelerator: Accelerator, coefficient: float, alone: bool) -> None:
    b = bucket(torch.bfloat16)
    state = DEF(COMPRESSORS[0], coefficient).attach(b, Context(StubCommunicator()))  # type: ignore[arg-type]
    assert isinstance(state, UpdateState)
    for flags in ([True, False, False, True], [True, True, False, True], [False] * 4):
        state.points.adopt_overwritten(flags, alone)


def test_measured_coefficients_are_loaded_as_they_were_kept(accelerator: Accelerator) -> None:
    """A running mean kept on the device rounds otherwise than Python's numbers: resuming must be exact."""
    state = DEF(COMPRESSORS[0], "auto").attach(bucket(), Context(StubCommunicator()))  # type: ignore[arg-type]
    numbers = {"coefficient": 0.3, "mean_square": 2.0, "square_mean": 0.6}
    state.load_state_dict({**numbers, "local_coefficient": 0.25, "lr": 0.1, "has_unsent_local_steps": False})
    measured = state._measured  # type: ignore[attr-defined]
    for number in (measured.coefficient, measured._mean_square, measured._square_mean):
        assert isinstance(number, Tensor) and number.device == DEVICE
