"""The regions that tests build on one machine have addresses of their own, can be cut off, and leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.chaos import regions
from tests.chaos.regions import NoNamespaces, Site
from tests.rig import ROOT, until

SAYS_ITS_NAME = """
import socket, sys
server = socket.create_server(("0.0.0.0", 5000))
while True:
    connection, _ = server.accept()
    with connection:
        connection.sendall(sys.argv[1].encode())
"""
ASKS = "import socket, sys; print(socket.create_connection((sys.argv[1], 5000), timeout=1).recv(100).decode())"
BUILDS_AND_HANGS = """
import subprocess, sys, time
from tests.chaos import regions
site, = regions.build(["europe-west"])
subprocess.Popen([*site.inside, "sleep", "60"])
print(site.namespace, flush=True)
time.sleep(60)
"""


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    """Two regions, in each a server that says its region's name to whoever connects."""
    try:
        made = regions.build(["asia-east", "europe-west"])
    except NoNamespaces as error:
        pytest.skip(str(error))
    servers = [subprocess.Popen([*site.inside, sys.executable, "-c", SAYS_ITS_NAME, site.region]) for site in made]
    try:
        for site in made:
            until(lambda site=site: answers(site))
        yield made
    finally:
        regions.remove()
        for server in servers:
            server.wait()


def ask(site: Site) -> str:
    with socket.create_connection((site.address, 5000), timeout=1) as connection:
        return connection.recv(100).decode()


def answers(site: Site) -> bool:
    try:
        return bool(ask(site))
    except OSError:
        return False


def test_a_region_whose_link_is_down_is_reached_from_inside_alone_until_it_is_up_again(sites: list[Site]):
    asia, europe = sites
    assert [ask(site) for site in sites] == ["asia-east", "europe-west"]

    europe.cut()
    assert ask(asia) == "asia-east"
    assert not answers(europe)
    inside = subprocess.run(
        [*europe.inside, sys.executable, "-c", ASKS, europe.address], capture_output=True, text=True, check=True
    )
    assert inside.stdout.strip() == "europe-west"

    europe.heal()
    until(lambda: answers(europe))


def test_what_a_killed_run_left_behind_is_removed_by_the_next(sites: list[Site]):
    killed = subprocess.Popen([sys.executable, "-c", BUILDS_AND_HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    left = killed.stdout.readline().strip()
    assert left in listed("netns", "list")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()

    regions.remove()
    regions.build(["asia-east"])

    assert left not in listed("netns", "list")
    assert f"g{killed.pid}-" not in listed("link", "show")
    assert f"gpu-{os.getpid()}-asia-east" in listed("netns", "list")


def listed(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
