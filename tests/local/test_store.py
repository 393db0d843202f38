"""The embedded store, as a real process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from local.settings import LOOPBACK
from tests.rig import BUSY_S, free_port

#: Starts the store and stays until it is killed.
STARTER = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'local.store'])"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A free port and a data folder of its own."""
    return {**os.environ, "STORE_PORT": str(free_port()), "GPU_DATA_DIR": str(tmp_path)}


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes to end with the test."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


def connect(environ: dict[str, str]) -> redis.Redis:
    """A client of the store, once it answers."""
    client = redis.Redis(LOOPBACK, int(environ["STORE_PORT"]), decode_responses=True)
    end = time.monotonic() + 15
    while True:
        try:
            client.ping()
            return client
        except redis.ConnectionError:
            assert time.monotonic() < end, "the store does not answer"
            time.sleep(0.02)


def start(environ: dict[str, str], started: list[psutil.Process]) -> psutil.Popen:
    """`python -m local.store`."""
    process = psutil.Popen([sys.executable, "-m", "local.store"], env=environ, stdout=subprocess.DEVNULL)
    started.append(process)
    return process


def abandon(environ: dict[str, str], started: list[psutil.Process]) -> psutil.Process:
    """A store that lost whoever started it to a hard kill."""
    starter = psutil.Popen([sys.executable, "-c", STARTER], env=environ, stdout=subprocess.DEVNULL)
    started.append(starter)
    store = psutil.Process(connect(environ).info("server")["process_id"])
    started.append(store)
    starter.kill()
    starter.wait()
    return store


def test_it_keeps_data_evicts_nothing_and_listens_on_loopback_alone(
    environ: dict[str, str], started: list[psutil.Process]
) -> None:
    process = start(environ, started)

    client = connect(environ)
    client.set("key", "value")

    assert client.config_get("appendonly") == {"appendonly": "yes"}
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert {each.laddr.ip for each in process.net_connections() if each.status == "LISTEN"} == {LOOPBACK}


def test_sigterm_ends_it_within_two_seconds_and_loses_nothing(
    environ: dict[str, str], started: list[psutil.Process]
) -> None:
    first = start(environ, started)
    connect(environ).set("key", "value")

    began = time.monotonic()
    first.send_signal(signal.SIGTERM)

    assert first.wait(timeout=10) == 0
    assert time.monotonic() - began < 2 + BUSY_S
    start(environ, started)
    assert connect(environ).get("key") == "value"


def test_a_store_that_a_hard_kill_left_behind_hinders_no_start(
    environ: dict[str, str], started: list[psutil.Process]
) -> None:
    leftover = abandon(environ, started)
    connect(environ).set("key", "value")

    process = start(environ, started)

    psutil.wait_procs([leftover], timeout=10)
    assert not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE
    client = connect(environ)
    assert client.get("key") == "value"
    assert client.info("server")["process_id"] == process.pid


def test_a_store_that_somebody_runs_is_left_alone(environ: dict[str, str], started: list[psutil.Process]) -> None:
    first = start(environ, started)
    client = connect(environ)

    second = start(environ, started)

    assert second.wait(timeout=10) != 0
    assert client.info("server")["process_id"] == first.pid
