"""PostgreSQL and RabbitMQ as throw-away servers of the test run's own: free ports, a temporary folder, no service.

Both come from Debian's packages; .ci/run installs them. Nothing that is installed is touched or started.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import amqp
import psycopg
import pytest
from psycopg import sql

from tests.rig import free_port

STARTED_S = 60
STOPPED_S = 10
#: How long RabbitMQ waits for an acknowledgement here; its default is 30 minutes.
CONSUMER_TIMEOUT_S = 4
RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def missing(what: str) -> NoReturn:
    """Skip the test that asks for a server which is not there; in CI fail it, or nobody would ever notice."""
    message = f"{what} is not installed; .ci/run installs it."
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Postgres:
    """A PostgreSQL server that trusts everybody on 127.0.0.1; its databases need not outlive it."""

    def __init__(self) -> None:
        """Skips or fails the test where PostgreSQL is not installed."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
        if not found:
            missing("PostgreSQL")
        #: The folder of initdb, pg_dump and the others of its version.
        self.programs = found[-1].parent
        self.port = free_port()
        # Not under pytest's folder, which only its owner may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-postgres-"))
        self._user: str | None = None
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root.
            self._user = "postgres"
            account = pwd.getpwnam(self._user)
            os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make its files and start it; returns once it answers."""
        data = self.folder / "data"
        options = ["--username=tests", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        with (self.folder / "log").open("wb") as log:
            subprocess.run(
                [self.programs / "initdb", "-D", data, *options],
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
            given = {
                "listen_addresses": "127.0.0.1",
                "port": self.port,
                "unix_socket_directories": self.folder,
                "max_connections": 200,
                "fsync": "off",
                "full_page_writes": "off",
            }
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", data, *(f"--{name}={value}" for name, value in given.items())],
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own process group, so that Ctrl-C at pytest does not end it before its clients.
                start_new_session=True,
            )
        _until(self._answers, self._process, self.folder / "log")

    def stop(self) -> None:
        """End it and remove its files."""
        if self._process is not None:
            # Fast shutdown: open connections are cut.
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOPPED_S)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(STOPPED_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, name: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://tests@127.0.0.1:{self.port}/{name}"

    def create(self, name: str, template: str = "template1") -> str:
        """Make a database as a copy of another, to which nobody may be connected; its URL."""
        self._run(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._run(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _run(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class RabbitMq:
    """A RabbitMQ server without plugins that tests may stop, freeze and empty; its queues survive a restart."""

    def __init__(self, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        """inside: what to put before its command, so that it runs elsewhere, such as in a network namespace.

        Skips or fails the test where RabbitMQ is not installed.
        """
        if not RABBITMQ_SERVER.exists():
            missing("RabbitMQ")
        self.host = host
        self._inside = inside
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-rabbitmq-"))
        epmd_port = free_port()
        self._environ = {
            "PATH": os.environ["PATH"],
            # Erlang's cookie is written here.
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": f"tests{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "none"),
            # It looks for late acknowledgements once a second instead of once a minute, lets guest in from other
            # addresses than its own, and hands a copy of every message to amq.rabbitmq.trace.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-rabbit consumer_timeout {CONSUMER_TIMEOUT_S * 1000} -rabbit channel_tick_interval 1000"
                ' -rabbit loopback_users [] -rabbit trace_vhosts [<<"/">>]'
            ),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Without this a shell stands between us and the server, and catches the signals.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        self._epmd_port = epmd_port
        self._epmd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker URL."""
        return f"amqp://guest:guest@{self.host}:{self.port}//"

    def start(self) -> None:
        """Start it with the queues that it had, unless it runs; returns once it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        log = self.folder / "out"
        with log.open("ab") as out:
            if self._epmd is None:
                # Ours, in the foreground: the one that Erlang would start outlives the test run.
                self._epmd = subprocess.Popen(
                    [*self._inside, "epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"],
                    env=self._environ,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            self._process = subprocess.Popen(
                [*self._inside, RABBITMQ_SERVER],
                env=self._environ,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _until(self._answers, self._process, log)

    def kill(self) -> None:
        """End it hard; persistent messages in its queues are kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Connections stand, and new ones are accepted by the kernel; nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def empty(self, queues: Iterable[str]) -> None:
        """Remove these queues with all that they hold."""
        with self.connect() as connection:
            channel = connection.channel()
            for queue in queues:
                channel.queue_delete(queue)

    def connect(self) -> amqp.Connection:
        """A connection to it."""
        connection = amqp.Connection(f"{self.host}:{self.port}", connect_timeout=5, read_timeout=5)
        connection.connect()
        return connection

    def stop(self) -> None:
        """End it and remove its files."""
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except (OSError, amqp.AMQPError):
            return False
        return True


def _until(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTED_S
    while not answers():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{process.args} did not start:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.05)
