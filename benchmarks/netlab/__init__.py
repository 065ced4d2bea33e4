"""A virtual cluster on one machine: hosts as network namespaces, links with a rate, Horovod ranks on them."""

from .cluster import Cluster, LinkBytes, NetlabError, why_unavailable
from .launch import ClusterRun, RankResult, RunFailed, launch, run_on_cluster

__all__ = [
    "Cluster",
    "ClusterRun",
    "LinkBytes",
    "NetlabError",
    "RankResult",
    "RunFailed",
    "launch",
    "run_on_cluster",
    "why_unavailable",
]
