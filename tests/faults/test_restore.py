"""An older backup of the database is restored while the stores have gone on: every job it knows of still ends."""

import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from app.blobs import Blobs
from app.retention import Retention
from app.tables import open_database
from tasks.job import JobState
from tests.rig import Platform
from tests.servers import Postgres

ENDED_S = 30
#: The leader says this often, and a good deal more often, that it goes on leading.
TERM_S = 8


class SqliteFile:
    """What docs/operations.md says: SQLite's own online backup, and back the same way."""

    def __init__(self, url: str, backup: Path) -> None:
        self.url, self._live, self._backup = url, Path(url.removeprefix("sqlite:///")), backup

    def save(self) -> None:
        """Make the backup."""
        self._copy(self._live, self._backup)

    def restore(self) -> None:
        """Put it back."""
        self._copy(self._backup, self._live)

    def _copy(self, source: Path, target: Path) -> None:
        with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
            read.backup(written)


class PostgresDump:
    """What docs/operations.md says: pg_dump and pg_restore over the tables that are there."""

    def __init__(self, url: str, backup: Path, server: Postgres) -> None:
        self.url, self._backup, self._server = url, backup, server

    def save(self) -> None:
        """Make the backup."""
        self._run("pg_dump", "--format=custom", f"--file={self._backup}", self.url)

    def restore(self) -> None:
        """Put it back."""
        self._run("pg_restore", "--clean", "--if-exists", f"--dbname={self.url}", str(self._backup))

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([self._server.programs / program, *arguments], check=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> SqliteFile | PostgresDump:
    """A database that can be backed up and restored; the test runs once on each kind."""
    backup = tmp_path / "backup"
    if request.param == "sqlite":
        return SqliteFile(request.getfixturevalue("database_url"), backup)
    return PostgresDump(request.getfixturevalue("postgres_url"), backup, request.getfixturevalue("postgres"))


@pytest.fixture
def platform(make_platform: Callable[..., Platform], database: SqliteFile | PostgresDump) -> Platform:
    """A platform on that database."""
    return make_platform(DATABASE_URL=database.url)


def test_jobs_of_an_older_backup_all_end_and_what_it_does_not_know_is_dropped(platform, database):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    runs = platform.submit("sleep 1.5")
    platform.until(lambda: platform.status(runs) is JobState.RUNNING, ENDED_S)
    done, cancelled = platform.submit("done meanwhile"), platform.submit("cancelled meanwhile")
    database.save()
    # Control may not have led yet when it began to run.
    led_until = platform.dispatch.rows.leadership.until() or 0.0
    platform.dispatch.cancel(cancelled)
    later = platform.submit("after the backup")
    for row in (runs, done, later):
        assert platform.ended(row, ENDED_S).status is JobState.COMPLETED
    ledger = platform.dispatch.links["asia-east"].mailbox.ledger
    # Else the outcomes that still lie there would do, and nothing had to run again.
    platform.until(lambda: not any(ledger.look(row.id).outcome for row in (runs, done, later)), TERM_S)
    unknown = platform.submit("nobody serves it", region="europe-west", allow_cross_region=False)
    platform.until(lambda: (platform.dispatch.rows.leadership.until() or 0.0) > led_until + 1, TERM_S)

    platform.stop_control()
    database.restore()
    # The copy is of yesterday, so that what ran then seems to have run for a day.
    engine = open_database(database.url)
    with engine.connect() as connection:
        connection.execute(text("UPDATE jobs SET run_deadline = 1 WHERE run_deadline IS NOT NULL"))
    engine.dispose()
    assert platform.dispatch.rows.get(done.id).status is JobState.QUEUED
    platform.start_control()

    rows = platform.dispatch.rows
    platform.until(lambda: all(row.ended for row in rows.get_all([done.id, runs.id, cancelled.id]).values()), ENDED_S)
    ended = rows.get_all([done.id, runs.id, cancelled.id, later.id, unknown.id])
    assert {row.id: row.status for row in ended.values()} == {
        done.id: JobState.COMPLETED,
        runs.id: JobState.COMPLETED,
        cancelled.id: JobState.CANCELLED,
    }
    ran = Counter(re.findall(r"job (\S+) attempt \d+: completed after", worker.log.read_text()))
    assert (ran[done.id], ran[runs.id], ran[later.id]) == (2, 2, 1)
    assert ledger.position(unknown.id, "europe-west.llm") == 1
    blobs = Blobs(str(platform.folder / "blobs"))
    Retention(rows, platform.dispatch.links, blobs, result_hours=24, row_days=30).sweep_stores()
    assert ledger.position(unknown.id, "europe-west.llm") is None
