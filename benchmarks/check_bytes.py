"""Check that stats() reports the bytes that network interfaces count, within 5 %.

    sudo .venv/bin/python benchmarks/check_bytes.py --hosts 2 3 4

Methods without stats (Horovod's own) are compared with the formula of a ring. Exit code 1 on disagreement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.netlab import NetlabError, RunFailed, run_on_cluster
from benchmarks.netlab.launch import exit_on_sigterm

TOLERANCE = 0.05
_METHODS = ("dense", "ef", "def")
# Horovod's ranks negotiate once a cycle even when there is nothing to do: 0.1-0.8 MB/s at the default cycle of
# 1 ms, which does not belong to a step. Longer cycles make it small compared with the payload.
_ENVIRONMENT = {"HOROVOD_CYCLE_TIME": "20"}


@dataclass(frozen=True)
class Comparison:
    """Bytes of one rank over some steps: ``counted`` by its interface, ``reported`` by stats()."""

    hosts: int
    rank: int
    method: str
    counted: float
    reported: float

    @property
    def difference(self) -> float:
        """(counted - reported) / reported."""
        return (self.counted - self.reported) / self.reported

    @property
    def agrees(self) -> bool:
        """True if the two differ by at most the tolerance."""
        return abs(self.difference) <= TOLERANCE


def compare(
    hosts: int, methods: Sequence[str] = _METHODS, steps: int = 5, rate: float | None = None
) -> list[Comparison]:
    """Run ``steps`` steps of each method on a cluster of its own; return one comparison per rank and method."""
    script = [str(Path(__file__).resolve()), "--as-rank", "--steps", str(steps), "--methods", *methods]
    run = run_on_cluster(hosts, rate, script, _ENVIRONMENT)
    result = []
    for rank, output in enumerate(run.stdout):
        for method, (counted, reported) in json.loads(output.strip().splitlines()[-1]).items():
            result.append(Comparison(hosts, rank, method, counted, reported))
    return result


def measure(methods: Sequence[str], steps: int) -> None:
    """Run as one rank: print {method: [counted, reported]} as JSON."""
    import horovod.torch as hvd
    import torch

    from benchmarks.cases import expected_bytes, make_case, make_gradients
    from benchmarks.models import resnet50
    from benchmarks.step_time import bytes_sent, timed_step

    torch.set_num_threads(1)
    hvd.init()
    shapes = resnet50()
    gradients = make_gradients(shapes, hvd.rank())
    result = {}
    for method in methods:
        case = make_case(method, shapes, gradients)
        for _ in range(2):  # names are negotiated once
            timed_step(case, None)
        stats = case.stats()
        earlier = stats.total_bytes_sent if stats else 0.0
        before = bytes_sent()
        for _ in range(steps):
            timed_step(case, None)  # ends with a barrier: everything of the step is counted
        counted = bytes_sent() - before
        stats = case.stats()
        reported = stats.total_bytes_sent - earlier if stats else steps * expected_bytes(method, shapes, hvd.size())
        result[method] = (counted, reported)
    hvd.barrier()
    print(json.dumps(result))
    hvd.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Print a line per host count and method, for the rank that differs most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(_METHODS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.as_rank:
        measure(args.methods, args.steps)
        return 0
    exit_on_sigterm()
    good = True
    print(f"MB per rank over {args.steps} steps")
    print(f"{'hosts':>5} {'method':<13}{'interface':>11}{'stats':>11}{'difference':>12}")
    try:
        for hosts in args.hosts:
            rows = compare(hosts, args.methods, args.steps)
            for method in args.methods:
                worst = max((row for row in rows if row.method == method), key=lambda row: abs(row.difference))
                good = good and worst.agrees
                print(
                    f"{hosts:>5} {method:<13}{worst.counted / 1e6:>11.3f}{worst.reported / 1e6:>11.3f}"
                    f"{worst.difference:>+12.2%}   {'' if worst.agrees else 'DISAGREES'}",
                    flush=True,
                )
    except (NetlabError, RunFailed, ValueError) as error:
        print(f"check failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
