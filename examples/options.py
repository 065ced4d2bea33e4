"""The command line of the two training scripts, and the objects built from it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hvd_compress

ALGORITHMS = ("dense", "ef", "def", "dist-ef", "liec", "gs-sgd", "gtop-k")
COMPRESSORS = ("random-block", "random-k", "top-k", "sign", "low-rank", "cast", "identity")
# The default of --compressor for each algorithm. Those that choose coordinates themselves take no compressor.
USUAL = {"ef": "random-block", "def": "random-block", "dist-ef": "sign", "liec": "sign"}


def fraction(text: str) -> float:
    """Parse ``1/64`` or ``0.015625``, as type of an argparse option."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/64") from None


def coefficient(text: str) -> float | str:
    """Parse the coefficient of DEF, a number or ``auto``, as type of an argparse option."""
    return text if text == "auto" else fraction(text)


def parse(description: str | None) -> argparse.Namespace:
    """Parse the command line; the options of compression exist only in a script that imports hvd_compress."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    parser.add_argument(
        "--decay-at",
        type=fraction,
        nargs="*",
        default=[0.5, 0.75],
        help="fractions of the run after which the learning rate is divided by ten",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/train"), help="for log and checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    if "hvd_compress" not in sys.modules:
        return parser.parse_args()
    group = parser.add_argument_group("compression")
    group.add_argument("--compression", choices=ALGORITHMS, default="def", help="the algorithm")
    group.add_argument(
        "--compressor",
        choices=COMPRESSORS,
        help="what ef, def, dist-ef and liec send (default: random-block; sign for the last two)",
    )
    group.add_argument(
        "--density", type=fraction, default=1 / 64, help="fraction of elements sent; of gs-sgd, size of the sketch"
    )
    group.add_argument("--coefficient", type=coefficient, default=0.3, help="of def; may be `auto`")
    group.add_argument("--low-rank", type=int, default=4, help="of the factors that low-rank sends")
    group.add_argument("--averaging-period", type=int, default=32, help="of liec, in steps")
    group.add_argument(
        "--sketch-exchange",
        choices=["allreduce", "tree", "allgather"],
        default="allreduce",
        help="how gs-sgd adds sketches; a tree needs MPI, as gtop-k does",
    )
    group.add_argument(
        "--evaluate-virtual",
        action="store_true",
        help="evaluate also at the virtual iterate y (one dense allreduce an epoch)",
    )
    args = parser.parse_args()
    if args.compressor and args.compression not in USUAL:
        parser.error(f"--compressor {args.compressor}: {args.compression} takes none; leave it out")
    try:
        compression(args)  # report a combination that is not allowed before anything is started
    except ValueError as error:
        parser.error(str(error))
    return args


def compressor(args: argparse.Namespace) -> hvd_compress.Compressor:
    """Build the compressor of --compressor, --density and --low-rank, or the default one of the algorithm."""
    import hvd_compress

    build: dict[str, Callable[[], hvd_compress.Compressor]] = {
        "random-block": lambda: hvd_compress.RandomBlock(density=args.density, seed=args.seed),
        "random-k": lambda: hvd_compress.RandomK(density=args.density, seed=args.seed),
        "top-k": lambda: hvd_compress.TopK(density=args.density),
        "sign": hvd_compress.BlockSign,
        "low-rank": lambda: hvd_compress.LowRank(rank=args.low_rank, seed=args.seed),
        "cast": hvd_compress.Cast,
        "identity": hvd_compress.Identity,
    }
    return build[args.compressor or USUAL[args.compression]]()


def compression(args: argparse.Namespace) -> hvd_compress.Algorithm:
    """Build the algorithm of --compression; raise ValueError for a combination that is not allowed."""
    import hvd_compress

    build: dict[str, Callable[[], hvd_compress.Algorithm]] = {
        "dense": hvd_compress.Dense,
        "ef": lambda: hvd_compress.EF(compressor(args)),
        "def": lambda: hvd_compress.DEF(compressor(args), coefficient=args.coefficient),
        "dist-ef": lambda: hvd_compress.DistEF(compressor(args)),
        "liec": lambda: hvd_compress.LIEC(compressor(args), averaging_period=args.averaging_period),
        "gs-sgd": lambda: hvd_compress.GlobalSketch(
            hvd_compress.CountSketch(density=args.density, seed=args.seed), exchange=args.sketch_exchange
        ),
        "gtop-k": lambda: hvd_compress.GlobalTopK(density=args.density),
    }
    return build[args.compression]()


def require_batches(args: argparse.Namespace, batches: int, images: int) -> None:
    """Exit with the remedy if a rank has fewer images than one batch."""
    if not batches:
        sys.exit(
            f"--batch-size {args.batch_size}: each rank has {images} training images, fewer than one batch; "
            "take a smaller batch or fewer ranks"
        )


def warm_up_and_decay(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at a step: a linear warm-up, then a tenth at each of --decay-at."""
    warm_up = args.warmup_epochs * steps_per_epoch
    borders = [part * args.epochs * steps_per_epoch for part in args.decay_at]

    def factor(step: int) -> float:
        decayed: float = 0.1 ** sum(step >= border for border in borders)
        return decayed * min(1.0, (step + 1) / warm_up) if warm_up else decayed

    return factor
