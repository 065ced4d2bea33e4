"""Figures from the ranks' measurements: medians, ratios, floors, a table and a plot."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from benchmarks.cases import LOCAL

REFERENCE = "horovod"
_PHASES = ("zero_grad", "backward", "step")
# Bytes per element that an exact float32 method must move through memory besides the unwrapped step, not counting
# the exchange itself. dense: gradient into a contiguous buffer (read, write). ef: residual += gradient (read two,
# write one); the zeros of the aggregate stay from step to step. def: read the stepped weights, the shared weights
# and the error, write the error and the next point.
FLOOR_BYTES = {"dense": 8, "ef": 12, "def": 20}
# Targets: how many times smaller than Horovod's the overhead is, at 4 hosts; by Mbit/s (None: unlimited).
TARGETS: dict[tuple[float | None, str], float] = {
    (1000.0, "ef"): 20,
    (1000.0, "def"): 15,
    (100.0, "ef"): 45,
    (100.0, "def"): 45,
    (1000.0, "dense"): 1,
    (100.0, "dense"): 1,
    (None, "dense"): 1,
    (None, "ef"): 1,
    (None, "def"): 1,
}
TARGET_HOSTS = 4


def summarise(ranks: list[dict[str, Any]], rate: float | None) -> dict[str, Any]:
    """Compute the figures of one link rate; times are the maximum over ranks, then the median over repeats."""
    steps = {method: _step_times(ranks, method) for method in ranks[0]["records"]}
    base = median(steps[LOCAL])
    # The slowest rank of each copy, and the best copy, because other users of the machine only slow a copy down.
    copy = min(max(times) for times in zip(*(rank["copy_seconds"] for rank in ranks)))
    bandwidth = 8 * ranks[0]["elements"] / copy
    idle = mean(rank["idle_bytes_per_second"] for rank in ranks)
    figures: dict[str, Any] = {
        "rate_mbit": rate,
        "repeats": min(len(seconds) for seconds in steps.values()),
        "local_step_ms": 1e3 * base,
        "local_step_quartiles_ms": _quartiles(steps[LOCAL]),
        "local_phases_ms": _phases(ranks, LOCAL),
        "local_work": _work(ranks, LOCAL),
        "copy_gb_per_second": bandwidth / 1e9,
        "idle_bytes_per_second": idle,
        "methods": {},
    }
    for method, seconds in steps.items():
        if method != LOCAL:
            figures["methods"][method] = _method(ranks, method, seconds, base, bandwidth, rate)
    reference = figures["methods"].get(REFERENCE)
    for method, entry in figures["methods"].items():
        entry["times_less_than_horovod"] = None
        # An overhead that is zero within the noise gives no ratio.
        if reference and entry["overhead_ms"] > 0:
            entry["times_less_than_horovod"] = reference["overhead_ms"] / entry["overhead_ms"]
        entry["target"] = TARGETS.get((rate, method)) if reference and len(ranks) == TARGET_HOSTS else None
    return figures


def _method(
    ranks: list[dict[str, Any]], method: str, seconds: list[float], base: float, bandwidth: float, rate: float | None
) -> dict[str, Any]:
    expected = ranks[0]["expected_bytes"][method]
    floor = 1e3 * FLOOR_BYTES.get(method, 0) * ranks[0]["elements"] / bandwidth
    link = 8e3 * expected / (rate * 1e6) if rate else 0.0
    overhead = 1e3 * (median(seconds) - base)
    return {
        "measurements": len(seconds),
        "step_ms": 1e3 * median(seconds),
        "step_quartiles_ms": _quartiles(seconds),
        "overhead_ms": overhead,
        "phases_ms": _phases(ranks, method),
        "work": _work(ranks, method),
        "memory_floor_ms": floor,
        "link_floor_ms": link,
        "times_floor": overhead / (floor + link) if floor + link else None,
        "interface_bytes": mean(median(rank["records"][method]["sent"]) for rank in ranks),
        "formula_bytes": expected,
        "stats": _stats(ranks, method),
    }


def _step_times(ranks: list[dict[str, Any]], method: str) -> list[float]:
    repeats = zip(*(rank["records"][method]["seconds"] for rank in ranks))
    return [max(sum(phases) for phases in repeat) for repeat in repeats]


def _phases(ranks: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Compute each phase's median over ranks and repeats; these need not add up to the step of the slowest rank."""
    rows = [phases for rank in ranks for phases in rank["records"][method]["seconds"]]
    return {name: 1e3 * median(row[i] for row in rows) for i, name in enumerate(_PHASES)}


def _work(ranks: list[dict[str, Any]], method: str) -> dict[str, float]:
    """Compute processor time (user, system, all threads) and page faults of a step: medians over ranks and repeats."""
    records = [rank["records"][method] for rank in ranks]
    return {
        "cpu_ms": 1e3 * median(value for record in records for value in record["cpu_seconds"]),
        "page_faults": median(value for record in records for value in record["page_faults"]),
    }


def _stats(ranks: list[dict[str, Any]], method: str) -> dict[str, float]:
    rows = [row for rank in ranks for row in rank["records"][method]["stats"]]
    return {key: median(row[key] for row in rows) for key in rows[0]} if rows else {}


def _quartiles(seconds: list[float]) -> list[float]:
    if len(seconds) < 2:
        return [1e3 * seconds[0]] * 2
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return [1e3 * low, 1e3 * high]


def met(entry: dict[str, Any]) -> bool | None:
    """Return True if a method reaches its target, None if it has none."""
    if entry["target"] is None:
        return None
    ratio = entry["times_less_than_horovod"]
    return ratio is None or bool(ratio >= entry["target"])


def table(figures: dict[str, Any]) -> str:
    """Format the figures of one rate."""
    rate = f"{figures['rate_mbit']:g} Mbit/s" if figures["rate_mbit"] else "unlimited"
    low, high = figures["local_step_quartiles_ms"]
    head = (
        f"links {rate}; {figures['repeats']} repeats; unwrapped step {figures['local_step_ms']:.1f} ms "
        f"({low:.1f}..{high:.1f}); "
        f"copy {figures['copy_gb_per_second']:.1f} GB/s per rank"
    )
    columns = (
        f"  {'method':<13}{'step ms':>9}{'quartiles':>18}{'overhead':>10}{'floor':>8}{'Horovod /':>11}"
        f"{'target':>8}{'':>7}{'MB/step':>9}{'stats MB':>10}"
    )
    lines = [head, columns]
    for method, entry in figures["methods"].items():
        low, high = entry["step_quartiles_ms"]
        ratio, target = entry["times_less_than_horovod"], entry["target"]
        verdict = {None: "", True: "met", False: "MISSED"}[met(entry)]
        floor = entry["memory_floor_ms"] + entry["link_floor_ms"]
        counted = entry["stats"].get("bytes_sent")
        lines.append(
            f"  {method:<13}{entry['step_ms']:>9.1f}{f'{low:.1f}..{high:.1f}':>18}{entry['overhead_ms']:>10.1f}"
            f"{f'{floor:.1f}' if floor else '-':>8}{f'{ratio:.1f}x' if ratio else '-':>11}"
            f"{f'{target:g}x' if target else '-':>8}{verdict:>7}{entry['interface_bytes'] / 1e6:>9.2f}"
            f"{f'{counted / 1e6:.2f}' if counted is not None else '-':>10}"
        )
    lines.append(
        f"  {'ms in':<13}{'zero_grad':>10}{'backward':>10}{'step':>10}{'cpu ms':>10}{'faults':>10}"
        "   encode, decode, wait ms by stats()"
    )
    local = {"phases_ms": figures["local_phases_ms"], "work": figures["local_work"], "stats": {}}
    for method, entry in [(LOCAL, local), *figures["methods"].items()]:
        phases, work, stats = entry["phases_ms"], entry["work"], entry["stats"]
        inner = ", ".join(
            f"{1e3 * stats[key]:.1f}" for key in ("encode_seconds", "decode_seconds", "wait_seconds") if key in stats
        )
        lines.append(
            f"  {method:<13}"
            + "".join(f"{phases[name]:>10.1f}" for name in _PHASES)
            + f"{work['cpu_ms']:>10.1f}{work['page_faults']:>10.0f}   {inner}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Draw the overhead of every method at every rate, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = result["rates"]
    methods = list(rates[0]["methods"])
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        places = [group + (index - (len(methods) - 1) / 2) * width for group in range(len(rates))]
        entries = [rate["methods"][method] for rate in rates]
        # A logarithmic axis has no zero: an overhead of zero within the noise is drawn as a tenth of a millisecond.
        bars = axes.bar(places, [max(e["overhead_ms"], 0.1) for e in entries], width, label=method)
        labels = [
            f"{e['overhead_ms']:.0f} ms"
            if method == REFERENCE
            else f"{r:.3g}x"
            if (r := e["times_less_than_horovod"])
            else ""
            for e in entries
        ]
        axes.bar_label(bars, labels, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("overhead of a step, ms (bars: times less than Horovod)")
    axes.set_xticks(range(len(rates)), [f"{r['rate_mbit']:g} Mbit/s" if r["rate_mbit"] else "unlimited" for r in rates])
    axes.set_title(f"Distributed overhead, {result['model']}, {result['hosts']} hosts (lower is better)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)
