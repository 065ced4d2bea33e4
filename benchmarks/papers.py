"""Do the four papers' claims hold here? Fashion-MNIST, 8 ranks, 3 seeds, a small convolutional network.

Tunes a learning rate per method (one seed, a third of the steps), trains every method with it over the seeds,
and writes figures to benchmarks/results/papers.json, curves to docs/figures/ and the table into docs/papers.md.
About two hours on two cores. Finished runs are kept: an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import report  # noqa: E402
from convergence import BEGIN, END, update_page  # noqa: E402
from launch import command  # noqa: E402
from papers_cases import CASES  # noqa: E402

WORKER = ROOT / "benchmarks" / "papers_worker.py"
RESULTS = ROOT / "benchmarks" / "results" / "papers.json"
FIGURE = ROOT / "docs" / "figures" / "papers.png"
PAGE = ROOT / "docs" / "papers.md"
Run = tuple[str, float, int, int]


def done(log: Path) -> dict[Run, dict[str, Any]]:
    """Records of finished runs by (case, learning rate, seed, steps)."""
    lines = log.read_text().splitlines() if log.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["case"], r["lr"], r["seed"], r["steps"]): r for r in records}


def ensure(runs: list[Run], log: Path, args: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """Do what has not been done yet, in one job for Gloo and one for MPI; returns all records."""
    for mpi in (False, True):
        missing = [run for run in runs if run not in done(log) and CASES[run[0]].mpi == mpi]
        if not missing:
            continue
        arguments = [json.dumps(missing), "--output", str(log)]
        arguments += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        line = command(WORKER, arguments, args.ranks)
        if mpi:
            sharing = ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
            root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
            line = ["mpirun", *root, *sharing, "-np", str(args.ranks), sys.executable, str(WORKER), *arguments]
        subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done(log)


def tuned(args: argparse.Namespace, log: Path) -> dict[str, float]:
    """The learning rate of each case's grid that reaches most with one seed and a third of the steps."""
    steps = args.steps // 3
    runs = [(name, lr, 0, steps) for name in args.cases for lr in CASES[name].grid if len(CASES[name].grid) > 1]
    records = ensure(runs, log, args)
    return {
        name: max(CASES[name].grid, key=lambda lr, n=name: records.get((n, lr, 0, steps), {"accuracy": 0})["accuracy"])
        for name in args.cases
    }


def summarise(name: str, lr: float, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "question": CASES[name].question, "case": name, "lr": lr, "grid": CASES[name].grid, "seeds": len(records),
        "steps": records[0]["steps"], "ranks": records[0]["ranks"], "parameters": records[0]["parameters"],
        "accuracy": [r["accuracy"] for r in records], "train_loss": [r["train_loss"] for r in records],
        "bytes_per_step": statistics.mean(r["bytes_per_step"] for r in records),
        "curves": [r["curve"] for r in records],
    }


def markdown(summaries: list[dict[str, Any]]) -> str:
    rows = [
        [
            s["question"], s["case"], f"{s['lr']:g}", f"{statistics.mean(s['accuracy']):.2f}",
            f"{min(s['accuracy']):.2f} to {max(s['accuracy']):.2f}",
            "-" if None in s["train_loss"] else f"{statistics.mean(s['train_loss']):.3f}",
            f"{s['bytes_per_step'] / 1e3:.1f}",
        ]
        for s in summaries
    ]
    head = ["paper", "method", "lr", "test accuracy % (mean)", "lowest to highest", "train loss", "kB a step"]
    text: str = report.table(head, rows)
    return text


def plot(summaries: list[dict[str, Any]], path: Path) -> None:
    """Mean test accuracy along the run, a panel per question."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    questions = list(dict.fromkeys(s["question"] for s in summaries))
    figure, panels = pyplot.subplots(1, len(questions), figsize=(4.6 * len(questions), 4.2), layout="constrained",
                                     squeeze=False)
    for axes, question in zip(panels[0], questions):
        for index, s in enumerate(s for s in summaries if s["question"] == question):
            points = [statistics.mean(p) for p in zip(*s["curves"])]
            x = [s["steps"] * (i + 1) / len(points) for i in range(len(points))]
            colour, style = report.STYLES[index % len(report.STYLES)]
            marker = "o" if index >= len(report.STYLES) else None
            axes.plot(x, points, linestyle=style, color=colour, label=s["case"], marker=marker, ms=3)
        axes.set(title=question, xlabel="step", ylabel="test accuracy (%)", ylim=(50, 92))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--data-dir", type=Path, help="where the four Fashion-MNIST .gz files are")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"), help="for the records of runs")
    parser.add_argument("--no-docs", action="store_true", help="print only: leave results, figure and page alone")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    log = args.runs / f"runs-{args.ranks}ranks.jsonl"
    rates = tuned(args, log)
    records = ensure([(n, rates[n], seed, args.steps) for seed in range(args.seeds) for n in args.cases], log, args)
    summaries = [
        summarise(n, rates[n], [records[n, rates[n], seed, args.steps] for seed in range(args.seeds)])
        for n in args.cases
    ]
    print("\n" + markdown(summaries))
    if not args.no_docs:
        report.write_json({"command": "make papers", "records": summaries}, RESULTS)
        plot(summaries, FIGURE)
        if not PAGE.exists():
            PAGE.write_text(f"# The papers' methods compared\n\n`make papers`\n\n{BEGIN}\n{END}\n", encoding="utf-8")
        update_page(PAGE, markdown(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
