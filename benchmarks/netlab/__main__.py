"""Command line of the virtual cluster (needs root and iproute2).

python -m benchmarks.netlab run --hosts 4 --rate 1000 script.py ...   a cluster for one Horovod run
python -m benchmarks.netlab up 4 1000          a cluster that stays: hosts, Mbit/s or "unlimited"
python -m benchmarks.netlab rate 100           change its rate
python -m benchmarks.netlab stats              bytes that each host sent and received
python -m benchmarks.netlab exec 2 hostname    run a command on host 2
python -m benchmarks.netlab down
"""

from __future__ import annotations

import argparse
import os
import sys

from .cluster import Cluster, NetlabError, existing, parse_rate, rate_name
from .launch import exit_on_sigterm, run_on_cluster


def main(argv: list[str] | None = None) -> int:
    """Run one action; errors of use or of the machine go to standard error."""
    args = _parser().parse_args(argv)
    exit_on_sigterm()
    try:
        return _ACTIONS[args.action](args)
    except (NetlabError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="hvdlab", help="name of the cluster that stays (default %(default)s)")
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="one Horovod rank per host, on a cluster for this run only")
    run.add_argument("--hosts", type=int, default=4, help="1..8 (default %(default)s)")
    run.add_argument("--rate", type=parse_rate, default=None, help="Mbit/s per link (default unlimited)")
    run.add_argument("--timeout", type=float, default=600.0, help="seconds (default %(default)s)")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="script.py ...")
    up = actions.add_parser("up", help="bring a cluster up")
    up.add_argument("hosts", type=int)
    up.add_argument("rate", type=parse_rate)
    actions.add_parser("rate", help="change the rate of every link").add_argument("rate", type=parse_rate)
    actions.add_parser("stats", help="bytes sent and received by every host")
    actions.add_parser("down", help="remove the cluster")
    execute = actions.add_parser("exec", help="run a command on a host")
    execute.add_argument("host", type=int)
    execute.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def _run(args: argparse.Namespace) -> int:
    if not args.command:
        raise ValueError("run needs a script")
    run = run_on_cluster(args.hosts, args.rate, args.command, None, args.timeout, echo=True, check=False)
    for rank in run.ranks:
        print(f"host {rank.rank + 1} sent {rank.bytes_sent} received {rank.bytes_received}", file=sys.stderr)
    if run.failure:
        print(f"netlab: {run.failure}", file=sys.stderr)
    return run.returncode


def _up(args: argparse.Namespace) -> int:
    cluster = Cluster(args.hosts, args.rate, args.name)
    cluster.up()
    print(f"{cluster.hosts} hosts up at {rate_name(args.rate)} Mbit/s")
    return 0


def _rate(args: argparse.Namespace) -> int:
    existing(args.name).set_rate(args.rate)
    return 0


def _stats(args: argparse.Namespace) -> int:
    cluster = existing(args.name)
    for host, link in enumerate(cluster.counters(), start=1):
        print(f"host {host} {cluster.address(host)} sent {link.sent} received {link.received}")
    return 0


def _down(args: argparse.Namespace) -> int:
    Cluster(1, name=args.name).down()
    return 0


def _exec(args: argparse.Namespace) -> int:
    cluster = existing(args.name)
    if not 1 <= args.host <= cluster.hosts or not args.command:
        raise ValueError(f"exec needs a host in 1..{cluster.hosts} and a command")
    command = cluster.command(args.host, args.command)
    os.execvp(command[0], command)


_ACTIONS = {"run": _run, "up": _up, "rate": _rate, "stats": _stats, "down": _down, "exec": _exec}

if __name__ == "__main__":
    sys.exit(main())
