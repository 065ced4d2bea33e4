"""Bytes per rank and step, counted by network interfaces, against each paper's formula, and a model of 1024 ranks.

    sudo .venv/bin/python benchmarks/volume.py            2, 3, 4 and 8 hosts, ResNet-50's shapes
    sudo .venv/bin/python benchmarks/volume.py --hosts 4  one size only: no page is written

Write benchmarks/results/volume.json, a plot and the tables of docs/volume.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import volume_page
from benchmarks.formulas import METHODS, model_of
from benchmarks.models import resnet50
from benchmarks.netlab import Cluster, NetlabError, RunFailed, launch
from benchmarks.netlab.launch import exit_on_sigterm
from benchmarks.netlab.mpi import launch_mpi
from benchmarks.surroundings import surroundings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "volume.json"
HOSTS = (2, 3, 4, 8)
_WORKER = str(ROOT / "benchmarks" / "volume_worker.py")
_MARK = "VOLUME "  # begins a rank's JSON: launchers may print lines of their own
# As in check_bytes.py: idle negotiation does not belong to a step.
_ENVIRONMENT = {"HOROVOD_CYCLE_TIME": "20"}


def measure(hosts: int, names: list[str], timeout: float) -> list[dict[str, Any]]:
    """Return a record per method: bytes per step counted by interfaces, reported by stats() and by the formula."""
    by_method: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with Cluster(hosts) as cluster:
        for mpi in (False, True):
            chosen = [name for name in names if METHODS[name].mpi == mpi]
            if not chosen:
                continue
            if mpi:
                text = launch_mpi(cluster, [_WORKER, *chosen], _ENVIRONMENT, timeout)
            else:
                text = "".join(launch(cluster, [_WORKER, *chosen], _ENVIRONMENT, timeout).stdout)
            for line in text.splitlines():
                if line.startswith(_MARK):
                    record = json.loads(line.removeprefix(_MARK))
                    by_method[record.pop("method")].append(record)
    model = model_of(resnet50())
    return [
        {
            "method": name,
            "hosts": hosts,
            "formula": METHODS[name].volume(model, hosts).sent,
            "counted": mean(r["counted"] for r in by_method[name]),
            "most": max(r["counted"] for r in by_method[name]),
            "stats": mean(r["stats"] for r in by_method[name]) if METHODS[name].build else None,
        }
        for name in names
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the page if everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=list(HOSTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the runs of one size")
    args = parser.parse_args(argv)
    exit_on_sigterm()
    records, around = [], surroundings("benchmarks/volume.py", argv)
    print(f"{'hosts':>5}  {'method':<34}{'formula MB':>12}{'stats MB':>12}{'counted MB':>12}{'difference':>12}")
    try:
        for hosts in args.hosts:
            for record in measure(hosts, args.methods, args.timeout):
                records.append(record)
                stats = "-" if record["stats"] is None else f"{record['stats'] / 1e6:.3f}"
                difference = record["counted"] / record["formula"] - 1
                print(
                    f"{hosts:>5}  {record['method']:<34}{record['formula'] / 1e6:>12.3f}{stats:>12}"
                    f"{record['counted'] / 1e6:>12.3f}{difference:>+12.1%}",
                    flush=True,
                )
    except (NetlabError, RunFailed, ValueError) as error:
        print(f"volume: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if tuple(args.hosts) == HOSTS and args.methods == list(METHODS):
        RESULTS.write_text(json.dumps({**around, "records": records}, indent=1) + "\n", encoding="utf-8")
        volume_page.write(records)
        print(f"\nwritten: {RESULTS.relative_to(ROOT)}, docs/volume.md and its figure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
