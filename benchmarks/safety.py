"""Cost of what keeps a run safe: checks of every step, many small parameters, checkpoints. Two ranks on this host.

    .venv/bin/python benchmarks/safety.py --batch 8 --steps 5

Write benchmarks/results/safety.json, or with --device cuda:0, a GPU that the ranks share, safety_gpu.json. No root
needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from launch import command  # noqa: E402

from benchmarks.safety_worker import MARK  # noqa: E402
from benchmarks.surroundings import surroundings  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
_WORKER = ROOT / "benchmarks" / "safety_worker.py"


def summarise(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the slowest rank: seconds, and shares and ratios of medians of the same rank."""
    worst: dict[str, Any] = {"checks": {}, "small_parameters": {}, "saving": {}}
    for name in ranks[0]["checks"]:
        rows = [rank["checks"][name] for rank in ranks]
        worst["checks"][name] = {
            "step_seconds": max(row["step"] for row in rows),
            **{f"{part}_share": max(row[part] / row["step"] for row in rows) for part in ("nonfinite", "written")},
            "replicas_share_of_one_step": max(row["replicas"] / row["step"] for row in rows),
        }
    for name in ranks[0]["small parameters"]:
        rows = [rank["small parameters"] for rank in ranks]
        worst["small_parameters"][name] = {
            "step_seconds": max(row[name] for row in rows),
            "of_horovod": max(row[name] for row in rows) / max(row["horovod"] for row in rows),
        }
    for name in ranks[0]["saving"]:
        worst["saving"][name] = max(rank["saving"][name] for rank in ranks)
    return worst


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9, help="timed steps of ResNet-50 (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images a rank (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=12, help="of the other measurements (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where model and state are (default %(default)s)")
    args = parser.parse_args()
    result = surroundings("benchmarks/safety.py")
    asked = [str(args.steps), str(args.batch), str(args.repeats), args.device]
    argv = command(_WORKER, asked, args.ranks)
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=ROOT)
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or len(lines) != args.ranks:
        print(done.stdout + done.stderr, file=sys.stderr)
        return 1
    result.update({"model": "ResNet-50", "ranks": args.ranks, "batch": args.batch})
    ranks = [json.loads(line) for line in lines]
    result.update({"gpu": ranks[0].get("gpu"), **summarise(ranks)})
    print(json.dumps(result, indent=1))
    name = "safety.json" if args.device == "cpu" else "safety_gpu.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
