"""Draw the rooms of the package and the imports between them into docs/figures/rooms.png, from the code as it is."""

from __future__ import annotations

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hvd_compress"
FIGURE = ROOT / "docs" / "figures" / "rooms.png"
# Place (column, row) of each room in the figure, and what it is for.
ROOMS = {
    "checkpoint": (1.5, -1, "files of a whole job"),
    "optimizer": (1.5, 0, "the user's object"),
    "engine": (1.5, 1, "gradients, buckets, order"),
    "algorithms": (1.5, 2, "one paper a file"),
    "exchange": (1.5, 3, "how payloads travel"),
    "bucket": (0.4, 4, "what travels together"),
    "comm": (2.6, 5, "Horovod, mpi4py"),
    "compressors": (0.4, 5, "what travels: mathematics"),
    "telemetry": (3.1, 2, "figures"),
    "native": (0.4, 6, "compiled loops"),
    "validation": (2.6, 6, "checks of values"),
}


def room_of(path: Path) -> str:
    """Return the room that a file of the package lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def arrows() -> set[tuple[str, str]]:
    """Return (importing room, imported room) of all imports within the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            rooms = {name.split(".")[1] for name in names if name.startswith("hvd_compress.")}
            found |= {(room_of(path), room) for room in rooms & set(ROOMS)}
    return {(a, b) for a, b in found if a != b and a in ROOMS}


def is_implied(arrow: tuple[str, str], all_arrows: set[tuple[str, str]]) -> bool:
    """Return whether the target can be reached from the source by other arrows too."""
    source, target = arrow
    reached, front = set(), [b for a, b in all_arrows if a == source and b != target]
    while front:
        room = front.pop()
        if room not in reached:
            reached.add(room)
            front += [b for a, b in all_arrows if a == room]
    return target in reached


def main() -> None:
    """Draw the figure, imports that others imply in a lighter shade, and print how many arrows it has."""
    figure, axes = plt.subplots(figsize=(8, 9.6))
    found = arrows()
    for source, target in sorted(found):
        (x, y, _), (u, v, _) = ROOMS[source], ROOMS[target]
        implied = is_implied((source, target), found)
        axes.add_patch(
            FancyArrowPatch(
                (x, -y - 0.26),
                (u, -v + 0.26),
                arrowstyle="-|>",
                mutation_scale=9 if implied else 14,
                color="#c9d0dc" if implied else "#3b5b92",
                lw=0.7 if implied else 1.6,
                connectionstyle=f"arc3,rad={0.5 if implied and x == u else 0.0}",
                zorder=0 if implied else 1,
            )
        )
    for room, (x, y, purpose) in ROOMS.items():
        box = FancyBboxPatch(
            (x - 0.62, -y - 0.25), 1.24, 0.5, boxstyle="round,pad=0.02,rounding_size=0.06", fc="#eef3fb", ec="#3b5b92"
        )
        axes.add_patch(box)
        axes.text(x, -y + 0.1, room, ha="center", va="center", fontsize=12, fontweight="bold", color="#1f3864")
        axes.text(x, -y - 0.11, purpose, ha="center", va="center", fontsize=9)
    axes.set_xlim(-0.5, 3.9)
    axes.set_ylim(-6.5, 1.5)
    axes.axis("off")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130, bbox_inches="tight")
    print(f"{len(ROOMS)} rooms, {len(found)} arrows: {FIGURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
