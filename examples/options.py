"""The command line of the two training scripts, and what of it becomes an object."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hvd_compress


def fraction(text: str) -> float:
    """`1/64` or `0.015625`, for an option of argparse."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/64") from None


def coefficient(text: str) -> float | str:
    return text if text == "auto" else fraction(text)


def parse(description: str | None) -> argparse.Namespace:
    """The parsed command line; the options of compression are there only in a script that compresses."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="where the four Fashion-MNIST .gz files are")
    parser.add_argument("--train-samples", type=int, help="use only the first so many training images")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage of the ResNet")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--stop-after", type=int, help="stop after this epoch, for --resume to go on later")
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument("--lr", type=float, default=0.05, help="for the ranks together: not multiplied by them")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--warmup-epochs", type=float, default=2)
    parser.add_argument("--decay-at", type=fraction, nargs="*", default=[0.5, 0.75],
                        help="fractions of the run after which the learning rate is divided by ten")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/train"), help="for log and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    if "hvd_compress" in sys.modules:
        group = parser.add_argument_group("compression")
        group.add_argument("--compression", choices=["dense", "ef", "def"], default="def")
        group.add_argument("--density", type=fraction, default=1 / 64, help="fraction of elements sent")
        group.add_argument("--coefficient", type=coefficient, default=0.3, help="of DEF; may be `auto`")
        group.add_argument("--evaluate-virtual", action="store_true",
                           help="evaluate also at the virtual iterate y (one dense allreduce an epoch)")
    return parser.parse_args()


def compression(args: argparse.Namespace) -> hvd_compress.Dense | hvd_compress.EF | hvd_compress.DEF:
    """The algorithm asked for with --compression, --density and --coefficient."""
    import hvd_compress

    if args.compression == "dense":
        return hvd_compress.Dense()
    block = hvd_compress.RandomBlock(density=args.density, seed=args.seed)
    if args.compression == "ef":
        return hvd_compress.EF(block)
    return hvd_compress.DEF(block, coefficient=args.coefficient)


def warm_up_and_decay(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: a linear warm-up, then a tenth at each of --decay-at."""
    warm_up = args.warmup_epochs * steps_per_epoch
    borders = [part * args.epochs * steps_per_epoch for part in args.decay_at]

    def factor(step: int) -> float:
        decayed: float = 0.1 ** sum(step >= border for border in borders)
        return decayed * min(1.0, (step + 1) / warm_up) if warm_up else decayed

    return factor
