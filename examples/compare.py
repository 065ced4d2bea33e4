"""Train the same model dense and with DEF and compare accuracy, traffic and time: `make train`.

Other options are passed on to train.py, for example --epochs 50 or --lr 0.1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import report
from launch import LaunchError, launch

SCRIPT = Path(__file__).with_name("train.py")


def main() -> int:
    """Run both trainings, print a table, draw the curves; return 1 if a training failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes on this host (default: 2)")
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--density", default="1/64", help="of DEF: fraction of elements sent (default: 1/64)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")
    args, others = parser.parse_known_args()

    runs = {
        "dense": ["--compression", "dense"],
        f"DEF {args.density}": ["--compression", "def", "--density", args.density],
    }
    logs = {}
    for name, options in runs.items():
        directory = args.output / options[1]
        # The files of an earlier run must not be mistaken for those of this one.
        shutil.rmtree(directory, ignore_errors=True)
        print(f"\n{name}: {args.dataset}, {args.ranks} ranks", flush=True)
        arguments = [*options, "--dataset", args.dataset, "--output", str(directory), *others]
        try:
            launch(SCRIPT, arguments, args.ranks, directory / "output.txt")
        except LaunchError as error:
            print(f"\n{name} FAILED: {error}", file=sys.stderr)
            return 1
        logs[name] = report.read_log(directory / "log.json")

    picture = args.output / "curves.png"
    report.curves(logs, picture, f"{args.dataset}, {args.ranks} ranks")
    print(f"\n{report.summary(logs)}\n")
    print(f"curves     {picture}")
    for name, options in runs.items():
        print(f"{name:10} {args.output / options[1]}  (log.json, checkpoint.pt, output.txt)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
