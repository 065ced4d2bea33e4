"""The record of a run: a line per epoch on the screen, a JSON log on disk, tables and curves of several."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import horovod.torch as hvd
from torch import nn
from tqdm import tqdm

# Colours that can be told apart without colour vision, and line styles for grey print.
STYLES = [("#0b5fa5", "-"), ("#d1601f", "--"), ("#4d8b31", "-."), ("#7a4fa3", ":"), ("#444444", (0, (6, 2)))]


class Log:
    """Record of a run, kept by every rank and written by rank 0 after every epoch."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, history: list[dict[str, Any]]) -> None:
        self.path = args.output / "log.json"
        self.history = list(history)
        self._head = {
            "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "ranks": hvd.size(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    @property
    def seconds(self) -> float:
        """Seconds of training in all epochs, also those before a resume."""
        return float(sum(epoch["seconds"] for epoch in self.history))

    @property
    def megabytes(self) -> float:
        """Megabytes sent by this rank in all epochs, also those before a resume."""
        return float(self.history[-1]["mb_sent"]) if self.history else 0.0

    def add(self, **epoch: float | None) -> None:
        """Add an epoch; figures that are not finite become null, because JSON has no NaN."""
        clean = {key: value if value is None or math.isfinite(value) else None for key, value in epoch.items()}
        self.history.append(clean)
        if hvd.rank() != 0:
            return
        tqdm.write(  # print would land in the middle of the progress bar
            f"epoch {clean['epoch']:3}  loss {_figure(clean['train_loss'], '.4f')}"
            f"  test loss {_figure(clean['test_loss'], '.4f')}"
            f"  test accuracy {_figure(clean['test_accuracy'], '.2f')} %"
            f"  {_figure(clean['mb_sent'], '.2f')} MB sent  {_figure(clean['seconds'], '.1f')} s"
        )
        sys.stdout.flush()
        content = {**self._head, "megabytes_sent": self.megabytes, "seconds": self.seconds, "epochs": self.history}
        write_json(content, self.path)


def _figure(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def write_json(content: Any, path: Path) -> None:
    """Write ``content`` to ``path`` completely or, if interrupted, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_log(path: Path) -> dict[str, Any]:
    """Read a log that ``Log`` has written."""
    log: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return log


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table that also reads well on a terminal: first column left, the others right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def summary(logs: dict[str, dict[str, Any]]) -> str:
    """Format a table of test accuracy, bytes and time, one finished run per row."""
    rows = []
    for name, log in logs.items():
        last = log["epochs"][-1]
        rows.append(
            [
                name,
                _figure(last["test_accuracy"], ".2f"),
                _figure(last["test_loss"], ".4f"),
                f"{log['megabytes_sent']:.2f}",
                f"{log['seconds']:.1f}",
            ]
        )
    return table(["run", "test accuracy %", "test loss", "MB sent per rank", "seconds training"], rows)


def curves(logs: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Plot test accuracy against epochs and against the megabytes that a rank has sent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_epoch, by_bytes) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for (colour, style), (name, log) in zip(STYLES, logs.items()):
        accuracy = [e["test_accuracy"] for e in log["epochs"]]
        by_epoch.plot([e["epoch"] for e in log["epochs"]], accuracy, style, color=colour, label=name)
        by_bytes.plot([e["mb_sent"] for e in log["epochs"]], accuracy, style, color=colour, label=name)
    # The last points matter most: start the axis a little below them.
    final = [log["epochs"][-1]["test_accuracy"] or 0 for log in logs.values()]
    by_epoch.set_ylim(max(0, min(*final, 100) - 15), 101)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy (%)")
    by_bytes.set(xlabel="MB sent per rank", xscale="log")
    for axes in (by_epoch, by_bytes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_epoch.legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
