"""One rank of safety.py: prints a line of JSON that begins with MARK, the same measurements on every rank."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from benchmarks.models import resnet50 as resnet50_shapes
from benchmarks.resnet import resnet50
from hvd_compress import DEF, EF, LIEC, Dense, DistEF, DistributedOptimizer, RandomBlock, checkpoint
from hvd_compress.algorithms import error_feedback, liec, update_state
from hvd_compress.engine import replica_check
from hvd_compress.engine.nonfinite import NonfiniteCheck
from hvd_compress.engine.overwritten import Overwritten

MARK = "SAFETY "
BLOCK = RandomBlock(1 / 64)
REAL_STEP = {"EF(RandomBlock)": EF(BLOCK), "DEF(RandomBlock)": DEF(BLOCK), "DistEF": DistEF(), "LIEC": LIEC()}
SMALL_COUNT, SMALL_SHAPE = 4000, (8, 8)
SMALL = {"dense": Dense(), "ef": EF(BLOCK), "def": DEF(BLOCK)}
# What looks for infinities, and for parameters that a script has written.
PARTS = {
    "nonfinite": (
        (error_feedback, "take_out"),
        (update_state, "take_out"),
        (liec, "take_out"),
        (NonfiniteCheck, "launch"),
        (NonfiniteCheck, "finish"),
    ),
    "written": ((Overwritten, "any_written"), (Overwritten, "record"), (Overwritten, "remember")),
}


def settle() -> None:
    """Wait for what the device still has to do: its work runs on after the call that asked for it."""
    if torch.empty(0).is_cuda:
        torch.cuda.synchronize()


class Clock:
    """Seconds spent inside functions, on the host and its device, by part; time inside of one another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its time added to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            settle()
            self._inside, begin = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                settle()
                self._inside = False
                self.seconds[part] += time.perf_counter() - begin

        return call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time the functions of ``PARTS`` inside."""
        originals = [(owner, name, getattr(owner, name)) for places in PARTS.values() for owner, name in places]
        for part, places in PARTS.items():
            for owner, name in places:
                setattr(owner, name, self.timed(part, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in originals:
                setattr(owner, name, function)


def checks(algorithm: Any, steps: int, batch: int) -> dict[str, float]:
    """Return medians over steps of a ResNet-50: seconds of a step, of the checks inside, of a check of replicas."""
    torch.manual_seed(0)
    model = resnet50()
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), algorithm)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    clock, found = Clock(), defaultdict(list)
    for _ in range(steps + 1):
        # Twice: on a device, measuring the parts keeps them from running beside anything else.
        found["step"].append(timed(step)[0])
        clock.seconds.clear()
        with clock.watching():
            found["watched step"].append(timed(step)[0])
        for part in PARTS:
            found[part].append(clock.seconds[part])
    rows = {key: median(values[1:]) for key, values in found.items()}
    reducer = optimizer._reducer
    look = functools.partial(replica_check.check_replicas, reducer.comm, reducer.states)
    return {**rows, "replicas": median(timed(functools.partial(look, reducer.step))[0] for _ in range(5))}


def small_parameters(repeats: int) -> dict[str, float]:
    """Return the median seconds of a step of a model of many small parameters, by method; methods take turns."""
    built = {}
    for name in ("horovod", *SMALL):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(SMALL_SHAPE)) for _ in range(SMALL_COUNT)]
        inner = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
        named = [(f"{name}.{i}", p) for i, p in enumerate(weights)]
        if name == "horovod":
            built[name] = weights, hvd.DistributedOptimizer(inner, named_parameters=named)
        else:
            built[name] = weights, DistributedOptimizer(inner, named, SMALL[name])
    times: dict[str, list[float]] = {name: [] for name in built}

    def step(weights: list[nn.Parameter], optimizer: Any) -> None:
        optimizer.zero_grad()
        torch.stack([p.square().sum() for p in weights]).sum().backward()
        optimizer.step()

    for _ in range(repeats + 2):
        for name, (weights, optimizer) in built.items():
            times[name].append(timed(functools.partial(step, weights, optimizer))[0])
    return {name: median(values[2:]) for name, values in times.items()}


def saving(repeats: int) -> dict[str, float]:
    """Return median seconds of saving ResNet-50, its momentum and residual, and of copying their bytes to the host."""
    weights = [nn.Parameter(torch.randn(shape)) for shape in resnet50_shapes()]
    gradients = [torch.randn_like(p) for p in weights]
    model = nn.ParameterList(weights)
    inner = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), EF(BLOCK))

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([(p * g).sum() for p, g in zip(weights, gradients)]).sum().backward()
        optimizer.step()

    with contextlib.ExitStack() as stack:
        own = stack.enter_context(tempfile.TemporaryDirectory()) if hvd.rank() == 0 else ""
        directory = hvd.broadcast_object(own, name="safety.directory")
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(repeats):
            found["step"] += [timed(step)[0] for _ in range(3)]
            state = optimizer.state_dict()
            tensors = [*tensors_of(state), *(p.data for p in weights)]
            found["bytes"].append(float(sum(t.nbytes for t in tensors)))
            found["copy"].append(timed(lambda kept=tensors: [t.detach().to("cpu", copy=True) for t in kept])[0])  # type: ignore[misc]
            del state, tensors
            found["save"].append(timed(lambda: checkpoint.save(directory, model, optimizer))[0])
            stall, pending = timed(lambda: checkpoint.save(directory, model, optimizer, asynchronous=True))
            found["stall"].append(stall)
            found["step while writing"] += [timed(step)[0] for _ in range(3)]
            pending.wait()
        hvd.barrier()
    return {key: median(values) for key, values in found.items()}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that ``action`` takes, begun by all ranks together, and its result."""
    settle()
    hvd.barrier()
    begin = time.perf_counter()
    result = action()
    settle()
    return time.perf_counter() - begin, result


def tensors_of(node: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries and lists."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from tensors_of(value)


def main() -> None:
    """Measure what the arguments ask for: steps of ResNet-50, its batch, repeats of the others, the device."""
    steps, batch, repeats = (int(text) for text in sys.argv[1:4])
    torch.set_num_threads(1)
    torch.set_default_device(sys.argv[4])
    hvd.init()
    result = {
        "checks": {name: checks(algorithm, steps, batch) for name, algorithm in REAL_STEP.items()},
        "small parameters": small_parameters(repeats),
        "saving": saving(max(2, repeats // 4)),
    }
    if torch.empty(0).is_cuda:
        result["gpu"] = torch.cuda.get_device_name()
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
