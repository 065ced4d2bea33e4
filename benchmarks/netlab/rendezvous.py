"""Horovod's Gloo rendezvous server: prints its port, serves until its standard input closes.

python rendezvous.py ADDRESS...        one rank per address, in rank order
"""

from __future__ import annotations

import sys

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer


def main(addresses: list[str]) -> None:
    """Serve the rank plan until standard input closes, which it does when the launcher ends."""
    plan = get_host_assignments(parse_hosts(",".join(f"{address}:1" for address in addresses)), len(addresses))
    server = RendezvousServer(0)
    port = server.start()
    server.init(plan)
    print(port, flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
