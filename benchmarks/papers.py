"""Compare the accuracy of the papers' methods: Fashion-MNIST, 8 ranks, 3 seeds, a small convolutional network.

Tune a learning rate per method (a seed of its own, a third of the steps, validation images that are not trained on),
train every method with it over the seeds, and write figures to benchmarks/results/papers.json, curves to docs/figures/
and the table to docs/papers.md. Every finished run is recorded at once: with --reuse an interrupted command continues.
Ranks are started by mpirun: gTop-k's tree needs MPI, and eight ranks of one host exchange faster by MPI than by Gloo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import report  # noqa: E402

from benchmarks.page import BEGIN, END, update_page  # noqa: E402
from benchmarks.papers_cases import CASES  # noqa: E402
from benchmarks.surroundings import surroundings  # noqa: E402

WORKER = ROOT / "benchmarks" / "papers_worker.py"
RESULTS = ROOT / "benchmarks" / "results" / "papers.json"
FIGURE = ROOT / "docs" / "figures" / "papers.png"
PAGE = ROOT / "docs" / "papers.md"
TUNING, TUNING_SEED, EXTENSIONS = 3, 1000, 6  # steps are divided by it; not a seed of the table; rates beyond the grid
POINTS = 10  # evaluations along a run
FLOOR, MARKERS = 50, "osD^v<>Xp*h"  # of the figure
GUESSING = 15.0  # percent: an accuracy up to this is a guess at one of ten classes
Run = tuple[str, float, int, int]


def done(log: Path) -> dict[Run, dict[str, Any]]:
    """Return the records of finished runs by (case, learning rate, seed, steps)."""
    lines = log.read_text().splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["case"], r["lr"], r["seed"], r["steps"]): r for r in records}


def ensure(runs: list[Run], points: int, log: Path, args: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """Do the runs that are missing, in one job; return all records."""
    missing = [run for run in runs if run not in done(log)]
    if missing:
        arguments = [json.dumps(missing), "--output", str(log), "--points", str(points)]
        arguments += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        # Open MPI polls while it waits; ranks that share a core must let each other have it.
        sharing = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        beside = Path(sys.executable).parent / "mpirun"
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
        line = [mpirun, *root, *sharing, "-np", str(args.ranks), sys.executable, str(WORKER), *arguments]
        subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done(log)


def score(record: dict[str, Any]) -> float:
    """Return the score of a learning rate: validation accuracy or, if nothing was learned, minus the rate.

    A diverged run still guesses some classes right, which must not count.
    """
    learned = record["train_loss"] is not None and record["validation"] > GUESSING
    return float(record["validation"]) if learned else -float(record["lr"])


def tuned(args: argparse.Namespace, log: Path) -> dict[str, dict[float, float]]:
    """Return the scores by learning rate of each tuned case: of its grid, beyond an end that is best, about the best.

    The grid rises by a factor of about 3; the last rates lie half-way between the best and its neighbours.
    """
    steps = args.steps // TUNING
    wanted = dict.fromkeys(CASES[name].rate_of or name for name in args.cases)
    grids = {name: list(CASES[name].grid) for name in wanted}
    found: dict[str, dict[float, float]] = {}

    def run() -> None:
        runs = [(name, lr, TUNING_SEED, steps) for name, grid in grids.items() for lr in grid]
        records = ensure(runs, 1, log, args)
        for name, grid in grids.items():
            found[name] = {lr: score(records[name, lr, TUNING_SEED, steps]) for lr in grid}

    for _ in range(1 + EXTENSIONS):
        run()
        for name, grid in grids.items():
            best = max(grid, key=found[name].__getitem__)
            if best == grid[-1]:
                grid.append(float(f"{best * grid[1] / grid[0]:.2g}"))
            elif best == grid[0]:
                grid.insert(0, float(f"{best * grid[0] / grid[1]:.2g}"))
    for name, grid in grids.items():
        best = max(found[name], key=found[name].__getitem__)
        between = math.sqrt(CASES[name].grid[1] / CASES[name].grid[0])
        grid += [float(f"{best / between:.2g}"), float(f"{best * between:.2g}")]
    run()
    return found


def summarise(name: str, lr: float, tuning: dict[float, float], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of one method: its learning rate, tuning scores and lists over the seeds."""
    return {
        "paper": CASES[name].paper,
        "case": name,
        "lr": lr,
        "tuning": tuning,
        "seeds": [r["seed"] for r in records],
        **{key: records[0][key] for key in ("steps", "ranks", "parameters", "bytes_per_step", "bytes_per_step_most")},
        **{key: [r[key] for r in records] for key in ("accuracy", "train_loss", "curve", "seconds")},
    }


def beside_others(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the stored results of methods that were not run now; return all in the table's order."""
    old = json.loads(RESULTS.read_text())["records"] if RESULTS.exists() else []
    by_case = {s["case"]: s for s in [*old, *summaries]}
    return [by_case[name] for name in CASES if name in by_case]


def markdown(summaries: list[dict[str, Any]]) -> str:
    """Format the table, a row per method."""
    rows = [
        [
            s["paper"],
            s["case"],
            f"{s['lr']:g}",
            f"{statistics.mean(s['accuracy']):.2f}",
            f"{min(s['accuracy']):.2f} to {max(s['accuracy']):.2f}",
            "-" if None in s["train_loss"] else f"{statistics.mean(s['train_loss']):.3f}",
            f"{s['bytes_per_step'] / 1e6:.4f}",
        ]
        for s in summaries
    ]
    head = [
        "paper",
        "method",
        "lr",
        "test accuracy % (mean)",
        "lowest to highest",
        "train loss",
        "MB per step and rank",
    ]
    text: str = report.table(head, rows)
    return text


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Plot mean test accuracy along the run, a panel per paper."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    papers = list(dict.fromkeys(s["paper"] for s in summaries))
    figure, panels = pyplot.subplots(
        1, len(papers), figsize=(4.6 * len(papers), 5.2), layout="constrained", squeeze=False
    )
    for axes, paper in zip(panels[0], papers):
        for index, s in enumerate(s for s in summaries if s["paper"] == paper):
            x = [step for step, _ in s["curve"][0]]
            points = [statistics.mean(accuracy for _, accuracy in at) for at in zip(*s["curve"])]
            # Full precision is black everywhere; each other method has a colour and a marker of its own.
            dense = s["case"].startswith("full precision")
            look = {"color": "black", "ls": "--"} if dense else {"color": f"C{index}", "marker": MARKERS[index]}
            final = f" ({points[-1]:.0f} %)" if points[-1] < FLOOR + 2 else ""
            axes.plot(x, points, label=s["case"] + final, ms=4, lw=1.3, **look)
        axes.set(title=paper, xlabel="step", ylabel=f"test accuracy (%), cut at {FLOOR}", ylim=(FLOOR, 92))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    """Tune, train and write table, figure and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        default=list(CASES),
        metavar="CASE",
        help="methods of the table to run; other rows are kept",
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--data-dir", type=Path, help="where the four Fashion-MNIST .gz files are")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"), help="for the records of runs")
    parser.add_argument("--reuse", action="store_true", help="use finished runs in --runs")
    parser.add_argument("--no-docs", action="store_true", help="print only: do not write results, figure and page")
    args = parser.parse_args()
    around = surroundings("benchmarks/papers.py")
    args.runs.mkdir(parents=True, exist_ok=True)
    log = args.runs / f"runs-{args.ranks}ranks.jsonl"
    if not args.reuse:
        log.unlink(missing_ok=True)
    tuning = tuned(args, log)
    best = {name: max(found, key=found.__getitem__) for name, found in tuning.items()}
    rates = {name: best[CASES[name].rate_of or name] for name in args.cases}
    runs = [(n, rates[n], seed, args.steps) for seed in range(args.seeds) for n in args.cases]
    records = ensure(runs, POINTS, log, args)
    summaries = [
        summarise(n, rates[n], tuning.get(n, {}), [records[run] for run in runs if run[0] == n]) for n in args.cases
    ]
    print("\n" + markdown(summaries))
    if not args.no_docs:
        # Rows can be measured singly, so each has the command and date of its own run.
        summaries = beside_others([{**s, **around} for s in summaries])
        report.write_json({"records": summaries}, RESULTS)
        plot(summaries, FIGURE)
        if not PAGE.exists():
            PAGE.write_text(f"# The papers' methods compared\n\n`make papers`\n\n{BEGIN}\n{END}\n", encoding="utf-8")
        update_page(PAGE, markdown(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
