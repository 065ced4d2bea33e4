"""Fingerprint training: one line per algorithm, compressor and number of ranks that changes if any bit of it does.

Each case trains 30 steps with momentum, weight decay, a warm-up and a drop of the learning rate. Its line hashes the
parameters after every step and the shared and virtual models now and then, hashes the residuals at the end, and adds
up the bytes sent. A change of the package that is meant to change no number leaves every line as it was:

    python scripts/fingerprint.py             # run everything, compare with the stored lines
    python scripts/fingerprint.py --write     # run everything, store the lines
    python scripts/fingerprint.py --package ../other-checkout --write --file /tmp/other.json

Gradients and updates are elementwise arithmetic on purpose, so that the lines depend on the processor as little as
possible. What still does (QR, norms) differs between machines: compare two versions of the package on one machine.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "fingerprint.json"
STEPS, WARMUP, DROP = 30, 5, 20
SHAPES = {"a.weight": (24, 16), "a.bias": (24,), "b.weight": (8, 4, 3, 3), "b.bias": (8,), "c.weight": (10, 30)}
JOBS = (("gloo", 1), ("gloo", 2), ("gloo", 3), ("mpi", 2), ("mpi", 3))

# Lines that were changed on purpose since they were stored: a pattern of "job, case", and the reason.
EXPECTED: dict[str, str] = {}


# -- one rank --------------------------------------------------------------------------------------------


def learning_rate(step: int) -> float:
    """Return the rate of a step: a warm-up, a plateau, a drop."""
    return 0.1 * min(1.0, (step + 1) / WARMUP) * (0.1 if step >= DROP else 1.0)


def train(algorithm: Any, options: dict[str, Any]) -> str:
    """Train one case on all ranks and return its line, the same on each."""
    import horovod.torch as hvd
    import torch

    import hvd_compress

    dtype, kind = options.pop("dtype", torch.float32), options.pop("optimizer", "sgd")
    rate = (lambda step: 0.05) if options.pop("constant_rate", False) else learning_rate
    model = torch.nn.ParameterDict(
        {
            name.replace(".", "_"): torch.nn.Parameter(_ramp(shape, 7 * index).to(dtype))
            for index, (name, shape) in enumerate(SHAPES.items())
        }
    )
    parameters = list(model.values())
    groups: list[dict[str, Any]] = [
        {"params": parameters[:4], "weight_decay": 1e-2},
        {"params": parameters[4:], "weight_decay": 1e-3},
    ]
    if options.pop("one_group", False):
        groups = [{"params": parameters, "weight_decay": 1e-2}]
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
        "nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        "adam": torch.optim.Adam,
    }
    optimizer = hvd_compress.DistributedOptimizer(
        make[kind](groups, lr=0.1), list(zip(SHAPES, parameters)), compression=algorithm, **options
    )
    points, residuals, sent = hashlib.sha256(), hashlib.sha256(), 0.0
    for step in range(STEPS):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = rate(step) * (0.01 if kind == "adam" else 1.0) / (1 + index)
        optimizer.zero_grad()
        for part in range(options.get("backward_passes_per_step", 1)):
            loss = torch.zeros((), dtype=torch.float64)
            for index, parameter in enumerate(parameters):
                target = _ramp(parameter.shape, 31 * step + 97 * hvd.rank() + 11 * index + 53 * part).to(dtype)
                loss = loss + ((index + 1) * 0.3 * (parameter - target).square()).double().sum()
            loss.backward()
        optimizer.step()
        _add(points, parameters)
        sent += optimizer.stats().bytes_sent
        if step % 10 == 9:
            with optimizer.consensus():
                _add(points, parameters)
            if kind != "adam":
                with optimizer.consensus("virtual"):
                    _add(points, parameters)
    _add(residuals, [r for r in (state.residual_vector() for state in optimizer._reducer.states) if r is not None])
    every = hvd.allgather_object((points.hexdigest(), residuals.hexdigest(), sent))
    digests = [hashlib.sha256("".join(values).encode()).hexdigest()[:12] for values in list(zip(*every))[:2]]
    return f"parameters {digests[0]}  residuals {digests[1]}  bytes {sum(sent for *_, sent in every):.1f}"


def _ramp(shape: Any, shift: int) -> Any:
    """Return numbers in [-0.5, 0.5) that are the same on every machine, in float32."""
    import torch

    numel = torch.Size(shape).numel()
    return ((torch.arange(numel) * 2654435761 + shift * 40503) % 1024).float().div_(1024).sub_(0.5).view(shape)


def _add(digest: Any, tensors: Any) -> None:
    import torch

    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def worker(launcher: str, wanted: str, output: Path) -> None:
    """Train every case on this rank; rank 0 writes the lines."""
    import horovod.torch as hvd
    import torch
    from fingerprint_cases import cases

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hvd.init()
    chosen = {name: case for name, case in cases(launcher, hvd.size()).items() if wanted in name}
    lines = {name: train(*case) for name, case in chosen.items()}
    if hvd.rank() == 0:
        output.write_text(json.dumps(lines))


# -- all jobs --------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Run every job, with compiled loops and without, and return the lines by job."""
    import tempfile

    from tests.multirank.support.harness import launch

    found: dict[str, dict[str, str]] = {}
    for native in ("1", "0"):
        for launcher, ranks in JOBS:
            if ranks not in args.ranks:
                continue
            name = f"{launcher} {ranks}, {'compiled' if native == '1' else 'fallback'} loops"
            with tempfile.TemporaryDirectory() as directory:
                output = Path(directory) / "lines.json"
                line = [sys.executable, str(Path(__file__)), "--worker", launcher, "--only", args.only]
                path = f"{args.package.resolve()}:{ROOT}"
                env = {"HVD_COMPRESS_NATIVE": native, "PYTHONPATH": path}
                ended = launch([*line, "--file", str(output)], ranks, launcher, env=env)
                if ended.returncode != 0 or not output.exists():
                    raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.output[-5000:]}")
                found[name] = json.loads(output.read_text())
            print(f"{name}: {len(found[name])} cases", flush=True)
    return found


def compare(found: dict[str, dict[str, str]], stored: dict[str, dict[str, str]]) -> int:
    """Print every line that differs from the stored one and return how many are not expected."""
    unexpected = equal = 0
    reasons: Counter[str] = Counter()
    for job, lines in found.items():
        for name, line in lines.items():
            before = stored.get(job, {}).get(name)
            if line == before:
                equal += 1
                continue
            same_bytes = before is not None and line.rpartition("bytes")[2] == before.rpartition("bytes")[2]
            reason = next((why for pattern, why in EXPECTED.items() if re.fullmatch(pattern, f"{job}, {name}")), None)
            if reason is not None and same_bytes:
                reasons[reason] += 1
                continue
            unexpected += 1
            print(f"{job}, {name} DIFFERS\n    stored {before}\n    now    {line}")
    for reason, count in reasons.items():
        print(f"{count} lines differ as expected, with the same bytes sent: {reason}")
    print(f"{equal} lines equal, {unexpected} differ unexpectedly")
    return unexpected


def main() -> None:
    """Parse the command line; exit with 1 if a line differs that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the lines instead of comparing them")
    parser.add_argument("--file", type=Path, default=STORED, help="where lines are stored")
    parser.add_argument("--package", type=Path, default=ROOT, help="checkout whose hvd_compress is run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--worker", metavar="LAUNCHER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.only, args.file)
    sys.path.insert(0, str(ROOT))
    from benchmarks.surroundings import surroundings

    head = surroundings("scripts/fingerprint.py")
    found = measure(args)
    if args.write:
        args.file.write_text(json.dumps({**head, "lines": found}, indent=1) + "\n")
        return None
    stored = json.loads(args.file.read_text())
    if stored["cpu"] != head["cpu"]:
        print(f"stored on {stored['cpu']}, running on {head['cpu']}: norms and factorisations may differ")
    raise SystemExit(1 if compare(found, stored["lines"]) else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
