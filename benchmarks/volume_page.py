"""The page docs/volume.md: tables of counted and of modelled volume, and the figure up to 1024 ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import report  # noqa: E402

from benchmarks.formulas import METHODS, Model, model_of  # noqa: E402
from benchmarks.models import resnet50  # noqa: E402
from benchmarks.page import update_page  # noqa: E402

PAGE = ROOT / "docs" / "volume.md"
FIGURE = ROOT / "docs" / "figures" / "volume.png"
FAR = 1024
# (name, seconds per message, bit/s)
LINKS = (("1 Gbit/s, 50 us", 50e-6, 1e9), ("25 Gbit/s, 5 us", 5e-6, 25e9))


def counted_table(records: list[dict[str, Any]]) -> str:
    """Format MB per rank and step, mean over ranks, and the difference to the formula."""
    hosts = sorted({r["hosts"] for r in records})
    found = {(r["method"], r["hosts"]): r for r in records}
    names = list(dict.fromkeys(r["method"] for r in records))
    rows = []
    for name in names:
        cells = []
        for p in hosts:
            r = found[name, p]
            cells.append(f"{r['counted'] / 1e6:.3f} ({r['counted'] / r['formula'] - 1:+.0%})")
        rows.append([name, METHODS[name].formula, *cells])
    table: str = report.table(["method", "formula", *(f"P = {p}" for p in hosts)], rows)
    return table


def model_table(model: Model) -> str:
    """Format the model's figures of 1024 ranks: volume, messages in sequence, time on two networks."""
    rows = []
    for name, method in METHODS.items():
        volume = method.volume(model, FAR)
        times = [f"{1e3 * volume.seconds(alpha, rate):.4g}" for _, alpha, rate in LINKS]
        rows.append([name, f"{volume.sent / 1e6:.4g}", f"{volume.rounds:.4g}", *times])
    head = ["method", "MB per rank", "messages in sequence", *(f"ms at {name}" for name, _, _ in LINKS)]
    table: str = report.table(head, rows)
    return table


def plot(records: list[dict[str, Any]], model: Model, path: Path) -> None:
    """Plot bytes per rank (lines: formulas; points: counted) and the modelled time of a step over the ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [2**i for i in range(1, 11)]
    figure, panels = pyplot.subplots(1, 1 + len(LINKS), figsize=(16, 6), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, (name, method) in enumerate(METHODS.items()):
        if name == "Dense":
            continue  # its curve is Horovod's
        colour = colours[index]
        style = "--" if index % 2 else "-"  # some curves coincide
        volumes = [method.volume(model, p) for p in ranks]
        panels[0].plot(ranks, [v.sent / 1e6 for v in volumes], color=colour, ls=style, lw=1.4, label=name)
        points = [(r["hosts"], r["counted"] / 1e6) for r in records if r["method"] == name]
        panels[0].plot(*zip(*points), "o", color=colour, ms=4)
        for axes, (_, alpha, rate) in zip(panels[1:], LINKS):
            axes.plot(ranks, [1e3 * v.seconds(alpha, rate) for v in volumes], color=colour, ls=style, lw=1.4)
    panels[0].set(title="MB sent per rank and step (points: counted)", ylabel="MB")
    for axes, (name, _, _) in zip(panels[1:], LINKS):
        axes.set(title=f"modelled time of the exchange, {name}", ylabel="ms")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.25)
    # Below the panels, because inside a panel the legend would cover a curve.
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(records: list[dict[str, Any]]) -> None:
    """Write tables and figure."""
    model = model_of(resnet50())
    text = f"{counted_table(records)}\n\nBy the model, {FAR} ranks:\n\n{model_table(model)}"
    update_page(PAGE, text)
    plot(records, model, FIGURE)
