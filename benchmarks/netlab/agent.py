"""Replacement of ssh for mpirun: ``agent.py [options] HOST COMMAND...`` runs a command on a host of a cluster.

HOST is an address of the cluster that the environment's NETLAB_CLUSTER names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.netlab.cluster import MAX_HOSTS, Cluster

if __name__ == "__main__":
    words = sys.argv[1:]
    while words[0].startswith("-"):
        words.pop(0)
    address, *rest = words
    cluster = Cluster(MAX_HOSTS, name=os.environ["NETLAB_CLUSTER"])
    command = cluster.command(int(address.rsplit(".", 1)[1]), ["/bin/sh", "-c", " ".join(rest)])
    os.execvp(command[0], command)
