"""Virtual cluster: one network namespace per host, joined by a bridge, every link limited to a rate.

Needs root and iproute2. Links are full duplex: the rate holds for each direction separately.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MAX_HOSTS = 8
INTERFACE = "eth0"
_NET = "10.83.0"
_SWITCH_ADDRESS = f"{_NET}.254"
_ETC = Path("/etc/netns")  # `ip netns exec` shows /etc/netns/NAME/hosts to the command as /etc/hosts
_serial = itertools.count()


class NetlabError(RuntimeError):
    """The virtual cluster cannot be built or used; the message says why."""


@dataclass(frozen=True)
class LinkBytes:
    """Bytes counted by one host's network interface."""

    sent: int
    received: int

    def __sub__(self, earlier: LinkBytes) -> LinkBytes:
        return LinkBytes(self.sent - earlier.sent, self.received - earlier.received)


def why_unavailable() -> str | None:
    """Return the reason why this machine cannot run a virtual cluster, or None if it can (for skipping tests)."""
    if not sys.platform.startswith("linux"):
        return "the virtual cluster needs Linux network namespaces"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"the virtual cluster needs {', '.join(missing)} (packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "the virtual cluster needs root: it makes network namespaces and rate limits"
    probe = _name_of_process() + "-probe"
    made = subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True, text=True)
    if made.returncode:
        return f"this kernel or container refuses network namespaces: {made.stderr.strip()}"
    _run("ip", "netns", "del", probe)
    return None


def parse_rate(text: str) -> float | None:
    """Read a rate in Mbit/s; "unlimited" is None. Raises ValueError, which argparse reports."""
    rate = None if text == "unlimited" else float(text)
    if rate is not None and rate <= 0:
        raise ValueError(f"rate must be 'unlimited' or Mbit/s > 0, got {text!r}")
    return rate


def rate_name(rate: float | None) -> str:
    """Write a rate as parse_rate reads it."""
    return "unlimited" if rate is None else f"{rate:g}"


class Cluster:
    """Hosts 1..n with addresses 10.83.0.1.. and own host names; a context manager brings it up and down.

    Without a name the cluster is private to this process, so several can exist at once.
    """

    def __init__(self, hosts: int, rate: float | None = None, name: str | None = None) -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"hosts must be in 1..{MAX_HOSTS}, got {hosts}")
        if rate is not None and rate <= 0:
            raise ValueError(f"rate must be None (unlimited) or Mbit/s > 0, got {rate}")
        self.hosts = hosts
        self.rate = rate
        self.name = name or f"{_name_of_process()}x{next(_serial)}"

    def __enter__(self) -> Cluster:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def address(self, host: int) -> str:
        """Return the address of host 1..n; 0 is the switch, whose traffic no host's counter sees."""
        return f"{_NET}.{host}" if host else _SWITCH_ADDRESS

    def namespace(self, host: int) -> str:
        """Return the network namespace (and host name) of host 1..n, or of the switch for 0."""
        return f"{self.name}-{host}"

    def up(self) -> None:
        """Build the hosts and links; a half-built or stale cluster of the same name is replaced."""
        reason = why_unavailable()
        if reason:
            raise NetlabError(reason)
        _remove_abandoned()
        self.down()
        switch = self.namespace(0)
        self._add_namespace(0)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "addr", "add", f"{_SWITCH_ADDRESS}/24", "dev", "br0")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in range(1, self.hosts + 1):
            space, port = self.namespace(host), f"port{host}"
            self._add_namespace(host)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _run("ip", "-n", space, "link", "set", INTERFACE, "up")
            # A namespace can set its congestion control per route only. bbr paces itself by timers and
            # misjudges a virtual link. Kernels without cubic keep their own.
            _run(
                "ip",
                "-n",
                space,
                "route",
                "replace",
                f"{_NET}.0/24",
                "dev",
                INTERFACE,
                "src",
                self.address(host),
                "congctl",
                "cubic",
                check=False,
            )
        self.set_rate(self.rate)

    def _add_namespace(self, host: int) -> None:
        space = self.namespace(host)
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "set", "lo", "up")
        names = "".join(f"{self.address(i)} {self.namespace(i)}\n" for i in range(self.hosts + 1))
        etc = _ETC / space
        etc.mkdir(parents=True, exist_ok=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="ascii")

    def set_rate(self, rate: float | None) -> None:
        """Limit every link, in both directions, to rate Mbit/s, or not at all with None."""
        self.rate = rate
        for host in range(1, self.hosts + 1):
            _limit(self.namespace(host), INTERFACE, rate)
            _limit(self.namespace(0), f"port{host}", rate)

    def counters(self) -> list[LinkBytes]:
        """Return the bytes that the interface of each host has counted since the cluster came up."""
        result = []
        for host in range(1, self.hosts + 1):
            text = _run("ip", "-n", self.namespace(host), "-json", "-statistics", "link", "show", "dev", INTERFACE)
            stats = json.loads(text)[0]["stats64"]
            result.append(LinkBytes(int(stats["tx"]["bytes"]), int(stats["rx"]["bytes"])))
        return result

    def command(self, host: int, argv: list[str]) -> list[str]:
        """Return the command line that runs argv on a host (0: the switch) under the host's own name.

        Each program replaces the one before by exec, so the process id of the result is that of argv itself.
        """
        rename = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
        space = self.namespace(host)
        return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", rename, space, *argv]

    def down(self) -> None:
        """Remove every host and link of this cluster; safe to call when there is nothing."""
        pattern = re.compile(re.escape(self.name) + r"-\d+")
        _remove(space for space in _namespaces() if pattern.fullmatch(space))


def _name_of_process() -> str:
    return f"hvdlab{os.getpid()}"


def _run(*argv: str, check: bool = True) -> str:
    # A session of its own, so that Ctrl-C stops the program but not the clean-up that follows.
    done = subprocess.run(argv, check=False, capture_output=True, text=True, start_new_session=True)
    if check and done.returncode:
        raise NetlabError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _remove(spaces: Iterable[str], check: bool = True) -> None:
    for space in list(spaces):
        _run("ip", "netns", "del", space, check=check)
        shutil.rmtree(_ETC / space, ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove the namespaces of processes that were killed before they could clean up."""
    pattern = re.compile(r"hvdlab(\d+)(x\d+-\d+|-probe)")
    matches = (pattern.fullmatch(space) for space in _namespaces())
    # Unchecked: another process may be removing the same ones.
    _remove((m.group(0) for m in matches if m and not Path(f"/proc/{m.group(1)}").exists()), check=False)


def _limit(space: str, device: str, rate: float | None) -> None:
    if rate is None:
        # A plain queue: without one, veth drops packets when its ring is full.
        qdisc = ["pfifo", "limit", "1000"]
    else:
        # The bucket must hold one 64 KB segment and about 1 ms of the line; the queue behind it holds
        # 10 ms, and never less than 1 MB, so that drops stay rare.
        per_second = rate * 1e6 / 8
        burst = max(int(per_second / 1000), 70_000)
        qdisc = [
            "tbf",
            "rate",
            f"{int(rate * 1e6)}bit",
            "burst",
            str(burst),
            "limit",
            str(burst + max(int(per_second / 100), 1_000_000)),
        ]
    _run("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", device, "root", *qdisc)


def existing(name: str) -> Cluster:
    """Return the cluster of that name which an earlier command brought up."""
    hosts = sum(1 for space in _namespaces() if re.fullmatch(re.escape(name) + r"-[1-9]\d*", space))
    if not hosts:
        raise NetlabError("no cluster is up; bring one up with: up HOSTS RATE")
    return Cluster(hosts, name=name)
