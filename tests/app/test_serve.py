"""`python -m app.serve` as an operator starts it."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.forking import Fork
from tests.rig import free_port, until

ROOT = Path(__file__).parent.parent.parent
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}


@pytest.fixture
def environment(database_url: str, store_url: str, tmp_path: Path) -> dict[str, str]:
    """What the server is told."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": database_url,
        "GPU_STORE_URL": store_url,
        "GPU_BROKER_URL": store_url.removesuffix("1") + "0",
        "PORT": str(free_port()),
        "API_THREADS": "120",
    }


class Server(Fork):
    """A server, and what it printed."""

    def __init__(self, folder: Path, environ: dict[str, str], log: Path) -> None:
        super().__init__("app.serve", [], folder=folder, environ=environ, log=log)
        self._log = log

    @property
    def said(self) -> str:
        """Everything so far."""
        return self._log.read_text()

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it printed, once it has ended."""
        return self.wait(20), self.said


@pytest.fixture
def serve(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test, away from any .env."""
    started: list[Server] = []

    def start(**changes: str) -> Server:
        started.append(Server(tmp_path, {**environment, **changes}, tmp_path / f"serve{len(started)}.log"))
        return started[-1]

    yield start
    for server in started:
        server.kill()
        server.wait(20)


@pytest.fixture
def url(environment: dict[str, str]) -> str:
    return f"http://127.0.0.1:{environment['PORT']}"


def _up(url: str, server: Server) -> None:
    end = time.monotonic() + 20
    while True:
        assert server.poll() is None, server.said
        try:
            requests.get(f"{url}/health", timeout=1)
            return
        except requests.ConnectionError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_it_serves_and_warns_once_that_there_is_no_key(serve, url):
    process = serve()
    _up(url, process)

    assert requests.get(f"{url}/ready", timeout=5).status_code == 200
    answer = requests.post(f"{url}/api/v1/jobs", json=CHAT, timeout=5)
    assert answer.status_code == 202
    assert "Server" not in answer.headers
    process.send_signal(signal.SIGTERM)
    code, log = process.end()
    assert code == 0
    assert log.count("no API key exists") == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_soon_after_the_requests_that_run(serve, url, how):
    process = serve()
    _up(url, process)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(requests.post(f"{url}/api/v1/jobs/sync?timeout=1.5", json=CHAT, timeout=10))
    )
    thread.start()
    time.sleep(0.5)

    began = time.monotonic()
    process.send_signal(how)
    code, _ = process.end()
    thread.join()

    assert code == 0
    assert time.monotonic() - began < 7
    assert answers[0].status_code == 504


def test_a_port_in_use_is_named_with_its_variable(serve, environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environment["PORT"])))
        taken.listen()
        code, errors = serve().end()

    assert code == 2
    assert f"Port {environment['PORT']} is in use" in errors
    assert "set PORT" in errors


def test_a_store_that_evicts_is_refused_by_the_setting_to_change(serve, valkey):
    valkey.client().config_set("maxmemory", 100 * 1024**2, "maxmemory-policy", "volatile-lru")
    try:
        code, errors = serve().end()
    finally:
        valkey.client().config_set("maxmemory", 0, "maxmemory-policy", "noeviction")

    assert code == 2
    assert "maxmemory-policy noeviction" in errors


def test_another_address_without_a_key_is_refused_with_the_ways_out(serve):
    code, errors = serve(HOST="0.0.0.0").end()

    assert code == 2
    assert all(way in errors for way in ("keys create", "HOST=127.0.0.1", "GPU_ALLOW_ANONYMOUS=1"))


def test_another_address_is_served_with_a_key_or_by_the_operators_word(serve, url, app, make_key):
    process = serve(HOST="0.0.0.0", GPU_ALLOW_ANONYMOUS="1")
    _up(url, process)
    process.send_signal(signal.SIGTERM)
    assert "everybody who reaches this port" in process.end()[1]

    make_key("read")
    process = serve(HOST="0.0.0.0")
    _up(url, process)
    assert requests.get(f"{url}/api/v1/jobs", timeout=5).status_code == 401


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "http"), ("PORT", "70000"), ("API_THREADS", "1"), ("DATABASE_URL", "jobs.db")],
)
def test_a_setting_that_cannot_be_used_is_named(serve, name, value):
    code, errors = serve(**{name: value}).end()

    assert code == 2
    assert name in errors
    assert "Traceback" not in errors


def test_a_new_database_is_answered_with_the_command(serve, tmp_path):
    code, errors = serve(DATABASE_URL=f"sqlite:///{tmp_path}/new.db").end()

    assert code == 2
    assert "db upgrade" in errors


def test_a_connection_through_a_proxy_is_not_local(serve, url):
    _up(url, serve())

    answer = requests.get(f"{url}/api/v1/jobs", headers={"X-Forwarded-For": "203.0.113.7"}, timeout=5)

    assert answer.status_code == 401


def test_health_answers_while_every_sync_turn_is_taken(serve, url):
    process = serve()  # 120 threads: 60 may wait
    _up(url, process)
    answered: list[int] = []

    def wait() -> None:
        with suppress(requests.RequestException):
            answered.append(requests.post(f"{url}/api/v1/jobs/sync?timeout=60", json=CHAT, timeout=90).status_code)

    waiting = [threading.Thread(target=wait, daemon=True) for _ in range(100)]
    for thread in waiting:
        thread.start()
    until(lambda: len(answered) == 40, 30)

    for _ in range(10):
        assert requests.get(f"{url}/health", timeout=20).status_code == 200

    # Those that found no turn, and nobody else.
    assert answered == [503] * 40
    process.kill()
    for thread in waiting:
        thread.join()


def test_connections_that_send_nothing_keep_nobody_out(serve, url, environment):
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(allowed, 4000), most), most))
    _up(url, serve())
    address = ("127.0.0.1", int(environment["PORT"]))
    # More than select() can watch, and than one process may open unless it asks.
    silent = [socket.create_connection(address) for _ in range(1100)]
    for connection in silent:
        connection.sendall(b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10")

    assert requests.get(f"{url}/health", timeout=10).status_code == 200
    for connection in silent:
        connection.close()
