"""Step time on a virtual cluster: Horovod's own optimizer against Dense, EF and DEF of this package.

    sudo .venv/bin/python benchmarks/run.py            1000 and 100 Mbit/s and unlimited, 4 hosts
    sudo .venv/bin/python benchmarks/run.py --quick    1000 Mbit/s and unlimited, few repeats, ~2 minutes

Bring a cluster up, run step_time.py as one rank per host, take the cluster down, write JSON and a plot. A quick
run writes to runs/benchmarks, so that it does not replace the figures in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.netlab import Cluster, ClusterRun, NetlabError, RunFailed, launch
from benchmarks.netlab.cluster import parse_rate, rate_name
from benchmarks.netlab.launch import exit_on_sigterm
from benchmarks.report import met, plot, summarise, table
from benchmarks.surroundings import surroundings

ROOT = Path(__file__).resolve().parents[1]
_RANK_SCRIPT = ROOT / "benchmarks" / "step_time.py"
_METHODS = ("horovod", "horovod-fp16", "dense", "ef", "def")
# Mbit/s. Below this rate one dense step takes seconds, so half the repeats are made. Each of them measures the short
# steps three times, because their medians would otherwise be the noisiest figures of all.
_SLOW, _COMPRESSED_TIMES = 300.0, 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; --quick only changes defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, no slow links")
    parser.add_argument("--hosts", type=int, default=4, help="2..8 (default %(default)s)")
    parser.add_argument("--rates", nargs="+", type=parse_rate, metavar="MBIT", help='Mbit/s or "unlimited"')
    parser.add_argument("--methods", nargs="+", choices=_METHODS, help="default: all, fp16 not with --quick")
    parser.add_argument("--repeats", type=int, help="timed steps of each method (half on slow links)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps first (default %(default)s)")
    parser.add_argument("--budget", type=float, help="seconds of one rate after which no repeat beyond 3 is started")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one rate (default %(default)s)")
    parser.add_argument("--output", type=Path, help="directory of the results")
    parser.add_argument("--profile", action="store_true", help="rank 0 shows a profile per method (distorts times)")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    args = parser.parse_args(argv)
    args.rates = args.rates or ([1000.0, None] if args.quick else [1000.0, 100.0, None])
    args.methods = args.methods or [m for m in _METHODS if not args.quick or m != "horovod-fp16"]
    args.repeats = args.repeats or (5 if args.quick else 15)
    args.budget = args.budget or (40.0 if args.quick else 600.0)
    args.output = args.output or (ROOT / "runs" / "benchmarks" if args.quick else ROOT / "benchmarks" / "results")
    if args.repeats < 1 or args.warmup < 0:
        parser.error("--repeats must be at least 1 and --warmup at least 0")
    return args


def measure(cluster: Cluster, rate: float | None, args: argparse.Namespace) -> dict[str, Any]:
    """Run the ranks at one link rate and return the figures."""
    slow = rate is not None and rate < _SLOW
    repeats = max(3, args.repeats // 2) if slow else args.repeats
    cluster.set_rate(rate)
    command = [
        str(_RANK_SCRIPT),
        "--repeats",
        str(repeats),
        "--warmup",
        str(args.warmup),
        "--compressed-times",
        str(_COMPRESSED_TIMES if slow else 1),
        "--budget",
        str(args.budget),
        "--methods",
        *args.methods,
    ]
    run = launch(cluster, [*command, "--profile"] if args.profile else command, timeout=args.timeout)
    if args.profile:
        print(run.ranks[0].stderr)
    return summarise(measurements(run), rate)


def measurements(run: ClusterRun) -> list[dict[str, Any]]:
    """Return the JSON line that ends each rank's output."""
    return [json.loads(output.strip().splitlines()[-1]) for output in run.stdout]


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables as they come, write the results."""
    args = parse(argv)
    exit_on_sigterm()
    result: dict[str, Any] = {
        **surroundings("benchmarks/run.py", argv),
        "model": "ResNet-50",
        "hosts": args.hosts,
        "density": "1/64",
        "rates": [],
    }
    print(f"{result['hosts']} hosts, {result['cpu']}, {result['cores']} cores, load {result['load_before']}")
    try:
        with Cluster(args.hosts) as cluster:
            for rate in args.rates:
                figures = measure(cluster, rate, args)
                result["rates"].append(figures)
                print("\n" + table(figures), flush=True)
    except (NetlabError, RunFailed, ValueError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    args.output.mkdir(parents=True, exist_ok=True)
    name = "-".join(["step_time", f"{args.hosts}hosts", *(["quick"] if args.quick else [])])
    path = args.output / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, path.with_suffix(".png"))
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"\nwritten: {shown} and {shown.with_suffix('.png').name}")
    missed = [
        f"{method} at {rate_name(figures['rate_mbit'])}"
        for figures in result["rates"]
        for method, entry in figures["methods"].items()
        if met(entry) is False
    ]
    if missed:
        print(f"targets missed: {', '.join(missed)}")
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
