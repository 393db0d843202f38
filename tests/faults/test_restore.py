"""An older backup of the database is restored while the stores have gone on: every job it knows of still ends."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from app.blobs import Blobs
from app.retention import Retention
from tasks.job import JobState

ENDED_S = 30
#: The leader says this often, and a good deal more often, that it goes on leading.
TERM_S = 8


def copy(source: Path, target: Path) -> None:
    """What docs/operations.md says: SQLite's own online backup, and back the same way."""
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)


def test_jobs_of_an_older_backup_all_end_and_what_it_does_not_know_is_dropped(platform, tmp_path):
    live, backup = Path(platform.database_url.removeprefix("sqlite:///")), tmp_path / "backup.db"
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    runs = platform.submit("sleep 1.5")
    platform.until(lambda: platform.status(runs) is JobState.RUNNING, ENDED_S)
    done, cancelled = platform.submit("done meanwhile"), platform.submit("cancelled meanwhile")
    copy(live, backup)
    led_until = platform.dispatch.rows.led_until()
    platform.dispatch.cancel(cancelled)
    later = platform.submit("after the backup")
    for row in (runs, done, later):
        assert platform.ended(row, ENDED_S).status is JobState.COMPLETED
    ledger = platform.dispatch.links["asia-east"].mailbox.ledger
    # Else the outcomes that still lie there would do, and nothing had to run again.
    platform.until(lambda: not any(ledger.look(row.id).outcome for row in (runs, done, later)), TERM_S)
    unknown = platform.submit("nobody serves it", region="europe-west", allow_cross_region=False)
    platform.until(lambda: platform.dispatch.rows.led_until() > led_until + 1, TERM_S)

    platform.stop_control()
    with closing(sqlite3.connect(backup)) as database:
        # Of yesterday, so that what ran then seems to have run for a day.
        database.execute("UPDATE jobs SET run_deadline = 1 WHERE run_deadline IS NOT NULL")
        database.commit()
    copy(backup, live)
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
