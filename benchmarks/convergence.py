"""Compare the accuracy of compressed and of dense training: digits and Fashion-MNIST, 4 ranks, density 1/64.

Train examples/train.py dense, with EF and with DEF at the same learning rate, and with EF at a fifth of
it, over several seeds, on this host under horovodrun. Write the figures to benchmarks/results/, the
curves to docs/figures/ and the table to docs/convergence.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

import report  # noqa: E402
from launch import LaunchError, launch  # noqa: E402

from benchmarks.page import update_page  # noqa: E402
from benchmarks.surroundings import surroundings  # noqa: E402

SCRIPT = ROOT / "examples" / "train.py"
RESULTS = ROOT / "benchmarks" / "results" / "convergence.json"
FIGURE = ROOT / "docs" / "figures" / "convergence.png"
PAGE = ROOT / "docs" / "convergence.md"
MARGIN = 1.0  # points of test accuracy that DEF may lose


class Task(NamedTuple):
    """A data set and the settings of training on it, the same for every method. Rows of the table have its name."""

    name: str
    dataset: str
    lr: float
    options: list[str]


class Method(NamedTuple):
    """A value of --compression, and the factor by which the task's learning rate is reduced."""

    compression: str
    lr_divisor: float = 1.0


FASHION_MNIST = ["--batch-size", "32", "--width", "8", "--train-samples", "10000"]
TASKS = [
    Task("digits", "digits", 0.05, ["--epochs", "40", "--batch-size", "16", "--width", "16"]),
    Task("fashion-mnist", "fashion-mnist", 0.05, ["--epochs", "30", *FASHION_MNIST]),
    # Too short for this density: the table shows the loss of accuracy.
    Task("fashion-mnist, 12 epochs", "fashion-mnist", 0.05, ["--epochs", "12", *FASHION_MNIST]),
]
METHODS = {
    "dense": Method("dense"),
    "DEF": Method("def"),
    "EF": Method("ef"),
    "EF, lr / 5": Method("ef", 5),
}


def train(task: Task, method: Method, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the log; with --reuse, return that of a finished run."""
    lr = task.lr / method.lr_divisor
    directory = args.runs / re.sub("[ ,]+", "-", task.name) / f"{method.compression}-lr{lr:g}-seed{seed}"
    options = [
        "--dataset",
        task.dataset,
        "--lr",
        f"{lr:g}",
        "--seed",
        str(seed),
        *task.options,
        "--compression",
        method.compression,
        "--density",
        args.density,
    ]
    if method.compression != "dense":
        options.append("--evaluate-virtual")
    if args.data_dir:
        options += ["--data-dir", str(args.data_dir)]
    done = directory / "log.json"
    # The launcher's output file is removed when a run succeeds: without it the log is complete.
    if not (args.reuse and done.exists() and not (directory / "output.txt").exists()):
        done.unlink(missing_ok=True)
        launch(SCRIPT, [*options, "--output", str(directory)], args.ranks, directory / "output.txt", show=False)
        (directory / "output.txt").unlink()
    log: dict[str, Any] = report.read_log(done)
    return log


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything; return one record per task and method, with lists over the seeds."""
    records = []
    for task in TASKS:
        if task.name not in args.tasks:
            continue
        for name, method in METHODS.items():
            logs = []
            for seed in range(args.seeds):
                log = train(task, method, seed, args)
                logs.append(log)
                last = log["epochs"][-1]
                print(
                    f"{task.name:24} {name:11} seed {seed}  {last['test_accuracy']:6.2f} %"
                    f"  {log['megabytes_sent']:8.2f} MB  {log['seconds']:6.1f} s",
                    flush=True,
                )
            records.append(
                {
                    "task": task.name,
                    "method": name,
                    "lr": task.lr / method.lr_divisor,
                    "seeds": args.seeds,
                    "ranks": args.ranks,
                    "density": args.density,
                    "options": task.options,
                    "parameters": logs[0]["parameters"],
                    "megabytes_sent": logs[0]["megabytes_sent"],
                    "accuracy": [log["epochs"][-1]["test_accuracy"] for log in logs],
                    "virtual_accuracy": [log["epochs"][-1].get("virtual_accuracy") for log in logs],
                    "train_loss": [log["epochs"][-1]["train_loss"] for log in logs],
                    "curves": [[epoch["test_accuracy"] for epoch in log["epochs"]] for log in logs],
                }
            )
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """Format the table: mean over seeds, lowest and highest, difference to dense, volume."""
    dense = {r["task"]: r for r in records if r["method"] == "dense"}
    rows = []
    for r in records:
        reference = dense[r["task"]]
        rows.append(
            [
                r["task"],
                r["method"],
                f"{r['lr']:g}",
                f"{statistics.mean(r['accuracy']):.2f}",
                f"{min(r['accuracy']):.2f} to {max(r['accuracy']):.2f}",
                f"{statistics.mean(r['accuracy']) - statistics.mean(reference['accuracy']):+.2f}",
                _mean(r["virtual_accuracy"], ".2f"),
                _mean(r["train_loss"], ".4f"),
                f"{r['megabytes_sent']:.2f}",
            ]
        )
    text: str = report.table(
        [
            "task",
            "method",
            "lr",
            "test accuracy % (mean)",
            "lowest to highest",
            "against dense",
            "at the virtual point",
            "train loss",
            "MB sent per rank",
        ],
        rows,
    )
    return text


def _mean(values: list[Any], form: str) -> str:
    return "-" if any(value is None for value in values) else format(statistics.mean(values), form)


def verdicts(records: list[dict[str, Any]]) -> list[str]:
    """State for each task if DEF is within MARGIN of dense, and the gap of EF at the same learning rate."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in records):
        mean = {r["method"]: statistics.mean(r["accuracy"]) for r in records if r["task"] == task}
        gap, ef_gap = mean["DEF"] - mean["dense"], mean["EF"] - mean["dense"]
        word = "within" if gap >= -MARGIN else "NOT within"
        lines.append(
            f"{task}: DEF is {word} {MARGIN:g} point of dense ({gap:+.2f}); EF at the same learning rate: {ef_gap:+.2f}"
        )
    return lines


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Plot mean test accuracy per epoch, a panel per task, the range over seeds shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(r["task"] for r in records))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4), layout="constrained", squeeze=False)
    for axes, task in zip(panels[0], tasks):
        of_task = [r for r in records if r["task"] == task]
        for (colour, style), r in zip(report.STYLES, of_task):
            epochs = list(zip(*r["curves"]))
            x = range(1, len(epochs) + 1)
            axes.plot(x, [statistics.mean(e) for e in epochs], style, color=colour)
            axes.fill_between(x, [min(e) for e in epochs], [max(e) for e in epochs], color=colour, alpha=0.12, lw=0)
        axes.set_title(f"{task}, {of_task[0]['ranks']} ranks, density {of_task[0]['density']}")
        best = max(max(map(max, r["curves"])) for r in of_task)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(max(0, best - 40), min(101, best + 3)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # Below the panels, because inside a panel the legend would cover a curve.
    methods = [r["method"] for r in records if r["task"] == tasks[0]]
    figure.legend(panels[0][0].get_lines(), methods, loc="outside lower center", ncols=len(methods), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    """Train everything and write table, figure and data; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, metavar="TASK", help=" | ".join(names))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--density", default="1/64")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--data-dir", type=Path, help="where the four Fashion-MNIST .gz files are")
    parser.add_argument("--runs", type=Path, default=Path("runs/convergence"), help="for logs and checkpoints")
    parser.add_argument("--reuse", action="store_true", help="use finished runs in --runs")
    parser.add_argument("--no-docs", action="store_true", help="print only: do not write results, figure and page")
    args = parser.parse_args()
    around = surroundings("benchmarks/convergence.py")
    try:
        records = measure(args)
    except LaunchError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    text = markdown(records) + "\n\n" + "\n".join(f"- {line}" for line in verdicts(records))
    print("\n" + text)
    if not args.no_docs:
        report.write_json({**around, "records": records}, RESULTS)
        plot(records, FIGURE)
        update_page(PAGE, text)
        print(f"\nfigures {RESULTS}\ncurves  {FIGURE}\ntable   {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
