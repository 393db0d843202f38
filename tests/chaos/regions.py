"""Regions with addresses of their own on one machine: network namespaces, each behind a link that can be taken down.

    python -m tests.chaos.regions up asia-east europe-west
    ip netns exec gpu-up-asia-east celery -A tasks worker -Q asia-east.llm
    ip -n gpu-up-asia-east link set wan down        # a partition; `up` heals it
    python -m tests.chaos.regions down

A region's address lies on its loopback, too: with the link down its own servers and workers still reach each other,
while nothing comes in or out. Root only, since namespaces are.
"""

import argparse
import fcntl
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: For benchmarks of networks (RFC 2544): nobody routes it, so it clashes with no real network.
NETWORK = ipaddress.ip_network("198.18.0.0/15")
PREFIX = "gpu-"
#: The tag of what the command line builds; other tags are the process ids of test runs.
BY_HAND = "up"
#: The link's name inside every namespace.
LINK = "wan"
ENDED_S = 5.0


class NoNamespaces(Exception):
    """This machine, or this user, cannot make network namespaces; the message says why."""


@dataclass(frozen=True, slots=True)
class Site:
    """One region's place: a network namespace and its address."""

    region: str
    namespace: str
    #: Of the region, as all others reach it; with the link down, only from inside.
    address: str
    #: Of this end of its link.
    outside: str
    #: The link's outer end.
    link: str

    @property
    def inside(self) -> list[str]:
        """What to put before a command that is to run there; the process it starts becomes the command."""
        return ["ip", "netns", "exec", self.namespace]

    def cut(self) -> None:
        """Take the link down: packets vanish both ways, connections stand until somebody's patience ends."""
        _ip("-n", self.namespace, "link", "set", LINK, "down")

    def heal(self) -> None:
        """The link as new."""
        _ip("-n", self.namespace, "link", "set", LINK, "up")


def build(regions: Sequence[str], tag: str = str(os.getpid())) -> list[Site]:
    """A namespace for each region, linked to this one; what a dead run left behind is removed first.

    Raises NoNamespaces.
    """
    _require()
    sites: list[Site] = []
    try:
        with _alone():
            _sweep()
            networks = _free_networks()
            for number, region in enumerate(regions):
                _, outside, address, *_ = next(networks)
                # Linux takes 15 characters at the most.
                site = Site(region, f"{PREFIX}{tag}-{region}", str(address), str(outside), f"g{tag}-{number}")
                sites.append(site)
                _make(site)
    except Exception:
        remove(tag)
        raise
    return sites


def remove(tag: str = str(os.getpid())) -> None:
    """Take down every namespace of the tag, with the processes that still run in them and their links.

    Raises NoNamespaces.
    """
    _require()
    for namespace in _namespaces():
        if _tag(namespace) == tag:
            _end_all_in(namespace)
            # The namespace itself, and with it the link, lives on for as long as one of its processes does.
            _ip("-n", namespace, "link", "delete", LINK, check=False)
            _ip("netns", "delete", namespace, check=False)
    for link in _links():
        if link.startswith(f"g{tag}-"):
            _ip("link", "delete", link, check=False)


def _require() -> None:
    if os.geteuid() != 0:
        raise NoNamespaces("network namespaces need root")
    if shutil.which("ip") is None:
        raise NoNamespaces("network namespaces need `ip`, of Debian's iproute2")


def _sweep() -> None:
    """Remove what test runs left behind whose process is no more."""
    for tag in {_tag(namespace) for namespace in _namespaces()}:
        if tag.isdigit() and not Path("/proc", tag).exists():
            remove(tag)


def _make(site: Site) -> None:
    try:
        _ip("netns", "add", site.namespace)
        _ip("link", "add", site.link, "type", "veth", "peer", "name", LINK, "netns", site.namespace)
    except subprocess.CalledProcessError as error:
        # A container's root may not, and some kernels cannot. What fails after this is a fault of ours.
        raise NoNamespaces(f"network namespaces cannot be made here: {error.stderr.strip()}") from error
    _ip("address", "add", f"{site.outside}/30", "dev", site.link)
    _ip("link", "set", site.link, "up")
    _ip("-n", site.namespace, "link", "set", "lo", "up")
    _ip("-n", site.namespace, "address", "add", f"{site.address}/32", "dev", "lo")
    _ip("-n", site.namespace, "address", "add", f"{site.address}/30", "dev", LINK)
    site.heal()


def _ip(*words: str, check: bool = True) -> str:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True).stdout


def _namespaces() -> list[str]:
    found = json.loads(_ip("-json", "netns", "list") or "[]")
    return [entry["name"] for entry in found if entry["name"].startswith(PREFIX)]


def _tag(namespace: str) -> str:
    return namespace.removeprefix(PREFIX).partition("-")[0]


def _links() -> list[str]:
    return [entry["ifname"] for entry in json.loads(_ip("-json", "link", "show", "type", "veth") or "[]")]


def _free_networks() -> Iterator[ipaddress.IPv4Network]:
    """Networks of four addresses that this machine has no address in."""
    known = {
        ipaddress.ip_address(address["local"])
        for entry in json.loads(_ip("-json", "-4", "address", "show"))
        for address in entry.get("addr_info", [])
    }
    assert isinstance(NETWORK, ipaddress.IPv4Network)
    return (network for network in NETWORK.subnets(new_prefix=30) if not known & set(network))


def _end_all_in(namespace: str) -> None:
    end = time.monotonic() + ENDED_S
    while processes := _ip("netns", "pids", namespace, check=False).split():
        for process in processes:
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            return
        time.sleep(0.02)


@contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time on this machine, so that no two take the same addresses."""
    with Path(tempfile.gettempdir(), "gpu-regions.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Entry of `python -m tests.chaos.regions`."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.regions", description="Regions in network namespaces.")
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("regions", nargs="*", default=["asia-east", "europe-west", "america-north"])
    given = parser.parse_args()
    try:
        remove(BY_HAND)
        for site in build(given.regions, BY_HAND) if given.command == "up" else []:
            print(f"{site.region}  {site.address}  {' '.join(site.inside)}")
    except NoNamespaces as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
