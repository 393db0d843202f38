"""The jobs table as Python reads and writes it: a row, the conditions that its indexes know, and its connections.

Whoever changes rows does it by statements that name the state they expect (app/rows.py).
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Engine, bindparam

from app.tables import jobs, open_database
from engines.catalogue import JobType
from tasks.job import LIVE, JobState

#: A job whose publish nobody proved is sent by the reconciler after this long.
UNPROVEN_S = 2.0


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as SQL has it; times are unix seconds, params and result JSON text."""

    id: str
    owner: str
    type: JobType
    model: str | None
    requested_model: str | None
    params: str
    priority: int
    #: The region that its client asked for or comes from: the job's home. None in rows of an earlier version.
    region_wanted: str | None
    #: Where it is queued, runs or ran.
    region: str
    allow_cross_region: bool
    timeout_seconds: float
    queue_deadline: float | None
    status: JobState
    attempt: int
    losses: int
    version: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    #: When params and result were deleted.
    pruned_at: float | None
    worker_id: str | None
    result: str | None
    error_code: str | None
    error_message: str | None
    fingerprint: str | None
    #: The job that its owner runs again with this one.
    retry_of: str | None
    sends: int
    withdrawn: bool
    #: The queue that it is held back from until it is its key's turn (app/turns.py).
    held_for: str | None
    #: What it used (app/usage.py).
    meter: str | None

    @property
    def ended(self) -> bool:
        """Whether it has its outcome."""
        return self.status not in LIVE


#: What a JobRow is read from.
COLUMNS = [jobs.c[field.name] for field in fields(JobRow)]
# Written into the statement, not bound: a bound value would not match the condition of a partial index.
IS_LIVE = jobs.c.status.in_(bindparam("live", [str(state) for state in LIVE], expanding=True, literal_execute=True))
#: Likewise, for the index of queued jobs alone.
INDEXED_QUEUED = jobs.c.status == bindparam("queued", str(JobState.QUEUED), literal_execute=True)
#: It waits for its key's turn.
IS_HELD = jobs.c.held_for.is_not(None)


class JobTable:
    """Raises sqlalchemy.exc.OperationalError when the database is away or locked for too long."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # For writes that nobody has been told of: what the power takes away is done again, and no one waits for the
        # disk. Any later durable commit makes them durable too.
        self._hasty = engine
        if engine.dialect.name == "sqlite":
            self._hasty = open_database(engine.url.render_as_string(hide_password=False), durable=False)
        # SQLite has one writer at a time; threads of one process queue here instead of polling for its lock.
        self._turn: Any = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    def some(self, query: Any, limit: int) -> list[JobRow]:
        """The first rows that the query finds."""
        with self.engine.connect() as connection:
            return [row_of(found) for found in connection.execute(query.limit(limit))]

    def returning(self, statement: Any, values: Mapping[str, Any]) -> JobRow | None:
        """Change one row, durably, and read it; None if nothing matched."""
        with self.writing(durable=True) as connection:
            changed = connection.execute(statement, values).first()
        return row_of(changed) if changed else None

    def write(self, statement: Any) -> int:
        """For what no client sees: how many rows were changed."""
        with self.writing(durable=False) as connection:
            return int(connection.execute(statement).rowcount)

    @contextmanager
    def writing(self, *, durable: bool) -> Iterator[Connection]:
        """A connection to write by; each statement is a transaction of its own.

        durable: somebody is told of it. Otherwise see __init__.
        """
        with self._turn, (self.engine if durable else self._hasty).connect() as connection:
            yield connection

    @contextmanager
    def together(self) -> Iterator[Connection]:
        """A connection on which everything is one transaction; for what no client was told of."""
        level: Any = "SERIALIZABLE" if self._hasty.dialect.name == "sqlite" else "READ COMMITTED"
        opened = self._hasty.connect().execution_options(isolation_level=level)
        with self._turn, opened as connection, connection.begin():
            yield connection


def row_of(found: Any) -> JobRow:
    """The job of what a statement returned for COLUMNS."""
    values = dict(found._mapping)
    values["type"] = JobType(values["type"])
    values["status"] = JobState(values["status"])
    return JobRow(**values)
