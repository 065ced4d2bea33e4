"""One rank of the step-time benchmark; prints its measurements as one line of JSON.

Started on every host by run.py. Time `zero_grad + backward + step` of each method, and of the unwrapped optimizer on
all ranks at once, in turn: a disturbance of the machine then affects all of them alike.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import pstats
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import horovod.torch as hvd
import torch

from benchmarks.cases import (
    COMPRESSED,
    LOCAL,
    METHODS,
    Case,
    expected_bytes,
    make_case,
    make_gradients,
)
from benchmarks.models import numel, resnet50

_COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")  # of this rank's own host
_LEAST_REPEATS = 3  # made even after the budget is spent


def bytes_sent() -> int:
    """Return what this host's network interface has sent so far."""
    return int(_COUNTER.read_text(encoding="ascii"))


@dataclasses.dataclass
class Record:
    """Measurements of one method on one rank; one entry per repeat.

    Processor time (of all threads, Horovod's too) and page faults show where time is spent, and are affected less than
    seconds when others use the machine.
    """

    seconds: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    page_faults: list[int] = dataclasses.field(default_factory=list)
    stats: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def timed_step(case: Case, record: Record | None, profile: cProfile.Profile | None = None) -> None:
    """Run one training step from a common start; record the seconds of zero_grad, backward and step."""
    outputs = case.forward()
    hvd.barrier()
    sent = bytes_sent()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    if profile:
        profile.enable()
    start = time.perf_counter()
    case.optimizer.zero_grad()
    zeroed = time.perf_counter()
    torch.autograd.backward(outputs)
    derived = time.perf_counter()
    case.optimizer.step()
    end = time.perf_counter()
    if profile:
        profile.disable()
    used = resource.getrusage(resource.RUSAGE_SELF)
    hvd.barrier()  # until then this rank may still forward messages of others
    if record is not None:
        record.cpu_seconds.append(used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime)
        record.page_faults.append(used.ru_minflt - usage.ru_minflt)
        record.seconds.append((zeroed - start, derived - zeroed, end - derived))
        record.sent.append(bytes_sent() - sent)
        stats = case.stats()
        if stats is not None:
            record.stats.append(_plain(stats))


def _plain(stats: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(stats)
    return {key: value for key, value in fields.items() if isinstance(value, (int, float))}


def copy_seconds(elements: int, repeats: int = 5) -> list[float]:
    """Time copies of one float32 model, all ranks at once: the memory speed available to a step."""
    source, target = torch.ones(elements), torch.zeros(elements)
    times = []
    for _ in range(repeats):
        hvd.barrier()
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return times


def idle_traffic(seconds: float = 1.0) -> float:
    """Return the bytes per second that Horovod's background negotiation sends while nothing happens."""
    hvd.barrier()
    start, sent = time.perf_counter(), bytes_sent()
    time.sleep(seconds)
    return (bytes_sent() - sent) / (time.perf_counter() - start)


def out_of_time(start: float, budget: float) -> bool:
    """Return True if the budget is spent by rank 0's clock, so that all ranks stop at the same repeat. Collective."""
    spent = torch.tensor([time.perf_counter() - start > budget], dtype=torch.int32)
    return bool(hvd.broadcast(spent, root_rank=0, name="out_of_time").item())


def main() -> None:
    """Measure all methods and print the record of this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compressed-times", type=int, default=1, help="measurements of ef and def in each repeat")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no repeat is started")
    parser.add_argument("--profile", action="store_true", help="rank 0 prints a profile per method (distorts)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    shapes = resnet50()
    gradients = make_gradients(shapes, hvd.rank())
    local = make_case(LOCAL, shapes, gradients)
    cases = [make_case(method, shapes, gradients) for method in args.methods]
    records = {case.method: Record() for case in (local, *cases)}
    profiles = {case.method: cProfile.Profile() for case in cases} if args.profile and hvd.rank() == 0 else {}
    start = time.perf_counter()
    for repeat in range(-args.warmup, args.repeats):
        if repeat >= min(args.repeats, _LEAST_REPEATS) and out_of_time(start, args.budget):
            break
        kept = repeat >= 0
        for case in cases:
            for _ in range(args.compressed_times if case.method in COMPRESSED else 1):
                timed_step(local, records[LOCAL] if kept else None)  # before each method, under the same load
                timed_step(case, records[case.method] if kept else None, profiles.get(case.method) if kept else None)
    result = {
        "rank": hvd.rank(),
        "records": {method: dataclasses.asdict(record) for method, record in records.items()},
        "expected_bytes": {method: expected_bytes(method, shapes, hvd.size()) for method in records},
        "copy_seconds": copy_seconds(numel(shapes)),
        "idle_bytes_per_second": idle_traffic(),
        "tensors": len(shapes),
        "elements": numel(shapes),
    }
    for method, profile in profiles.items():
        print(f"profile of {method}, {len(records[method].sent)} steps", file=sys.stderr)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(18)
    hvd.barrier()
    print(json.dumps(result))
    hvd.shutdown()


if __name__ == "__main__":
    main()
