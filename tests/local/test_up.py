"""`python -m local.up` with an engine that needs no weights: how it starts, stays and ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from local.settings import LOOPBACK
from tests.rig import ECHO, free_port

PORTS = ("PORT", "FLOWER_PORT", "STORE_PORT", "GPU_ADMIN_PORT")
UP = "everything is up"
#: Starting and stopping take a few seconds each; more on a machine that is busy with other tests.
LIMIT_S = 90


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Free ports, a data folder of its own, an engine without weights, and a proxy that reaches nothing."""
    ports = {name: str(free_port()) for name in PORTS}
    elsewhere = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    return {
        **os.environ,
        **ports,
        **elsewhere,
        "GPU_DATA_DIR": str(tmp_path / "var"),
        **ECHO,
    }


class Up:
    """A platform that was started, and what it printed."""

    def __init__(self, environ: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", "local.up"], env=environ, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        """Everything so far."""
        return self.log.read_text()

    def wait_for(self, text: str, after: str = "") -> None:
        """Return once it has printed that, after something else if need be."""
        end = time.monotonic() + LIMIT_S
        while text not in self.said[self.said.find(after) :] or after not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def children(self) -> dict[str, psutil.Process]:
        """What it runs, by a word of the command line."""
        words = {"store": "valkey-server", "api": "app.serve", "control": "app.control", "worker": "worker"}
        words.update(flower="flower", gpu_admin="gpu_admin:create_app")
        found = {child: " ".join(child.cmdline()) for child in self.process.children(recursive=True)}
        return {name: next(child for child, line in found.items() if word in line) for name, word in words.items()}


@pytest.fixture
def start(environ: dict[str, str], tmp_path: Path) -> Iterator[Callable[[], Up]]:
    """Starts a platform; whatever is left of it goes with the test."""
    ups: list[Up] = []

    def start() -> Up:
        ups.append(Up(environ, tmp_path / f"up{len(ups)}.log"))
        return ups[-1]

    yield start
    for up in ups:
        if up.process.poll() is None:
            for process in [up.process, *up.process.children(recursive=True)]:
                process.kill()
            up.process.wait()


def assert_gone(processes: dict[str, psutil.Process], environ: dict[str, str]) -> None:
    """Every process has ended, and nobody listens any more."""
    psutil.wait_procs(list(processes.values()), timeout=10)
    assert [name for name, process in processes.items() if process.is_running()] == []
    for name in PORTS:
        with socket.socket() as probe:
            assert probe.connect_ex((LOOPBACK, int(environ[name]))) != 0, name


def test_sigterm_ends_it_with_all_its_children(start: Callable[[], Up], environ: dict[str, str]) -> None:
    up = start()
    up.wait_for(UP)
    children = up.children()

    up.process.terminate()

    assert up.process.wait(timeout=LIMIT_S) == 0, up.said
    assert_gone(children, environ)


def test_ctrl_c_while_it_starts_ends_it_too(start: Callable[[], Up], environ: dict[str, str]) -> None:
    up = start()
    up.wait_for("store answers")
    children = up.children()

    up.process.send_signal(signal.SIGINT)

    assert up.process.wait(timeout=LIMIT_S) == 0, up.said
    assert UP not in up.said
    assert_gone(children, environ)


def test_a_hard_kill_leaves_nothing_that_hinders_the_next_start(
    start: Callable[[], Up], environ: dict[str, str]
) -> None:
    first = start()
    first.wait_for(UP)
    children = first.children()

    first.process.kill()
    first.process.wait()
    second = start()

    second.wait_for(UP)
    psutil.wait_procs(list(children.values()), timeout=10)
    assert not any(child.is_running() for child in children.values())


def test_what_dies_is_started_again(start: Callable[[], Up]) -> None:
    up = start()
    up.wait_for(UP)
    children = up.children()

    for name in ("store", "worker"):
        children[name].kill()

    again = "ended with exit code -9; it is started again"
    up.wait_for(f"store {again}")
    up.wait_for("ready.", after=f"worker {again}")
    assert up.process.poll() is None
    assert up.children().keys() == children.keys()


def test_a_worker_that_cannot_start_is_explained_and_leaves_nothing(
    start: Callable[[], Up], environ: dict[str, str]
) -> None:
    environ["GPU_LLM_MODEL"] = "no-such-model"

    up = start()

    assert up.process.wait(timeout=LIMIT_S) == 1
    assert "worker ended with exit code 78" in up.said
    assert "Unknown llm model 'no-such-model'" in up.said.rpartition("worker ended with exit code 78")[2]
    assert_gone({}, environ)


def test_a_second_one_on_the_same_data_is_refused(start: Callable[[], Up]) -> None:
    first = start()
    first.wait_for("database is migrated")

    second = start()

    assert second.process.wait(timeout=LIMIT_S) == 1
    assert f"already runs on {first.log.parent / 'var'} (pid {first.process.pid})" in second.said


def test_a_port_in_use_is_named_before_anything_starts(start: Callable[[], Up], environ: dict[str, str]) -> None:
    with socket.create_server((LOOPBACK, int(environ["FLOWER_PORT"]))):
        up = start()
        code = up.process.wait(timeout=LIMIT_S)

    assert code == 1
    assert f"Port {environ['FLOWER_PORT']} on {LOOPBACK}, wanted by Flower, is in use. Set FLOWER_PORT" in up.said
    assert "store" not in up.said
