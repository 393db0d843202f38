"""The SQL tables, how a database is opened, and how it is brought up to date. SQLite and PostgreSQL.

Times are unix seconds by the database's own clock, so that the clocks of API hosts play no part in any deadline.
"""

import sqlite3
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from tasks.job import JobState

#: A writer that finds the database locked gives up after this long.
SQLITE_BUSY_S = 5

metadata = MetaData()

_STATES = ", ".join(f"'{state}'" for state in JobState)
_IS_LIVE = text("status IN ('queued', 'running')")
_IS_QUEUED = text("status = 'queued'")
_IS_WHOLE = text("pruned_at IS NULL AND completed_at IS NOT NULL")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("type", String(16), nullable=False),
    #: The catalogue's id of the model that must run it, and what the client called it; null for any model.
    Column("model", String(255)),
    Column("requested_model", String(255)),
    #: The request's validated params as JSON, or where they lie (app/blobs.py); kept, so that it can be sent again.
    Column("params", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("region_wanted", String(64)),
    #: Where it is queued or runs.
    Column("region", String(64), nullable=False),
    Column("allow_cross_region", Boolean, nullable=False),
    Column("timeout_seconds", Double, nullable=False),
    Column("status", String(16), nullable=False),
    #: The fence: grows whenever what was sent before must no longer count, after a lost worker, an emptied store or a
    #: move to another region.
    Column("attempt", Integer, nullable=False),
    #: How many attempts ended with their worker; this, and not the attempt, says when a job has been tried enough.
    Column("losses", SmallInteger, nullable=False, server_default="0"),
    #: Grows with every write.
    Column("version", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    #: When its params and its result were deleted, a while after its end (app/retention.py).
    Column("pruned_at", Double),
    #: Queued for longer than this, it times out.
    Column("queue_deadline", Double),
    #: Running for longer than this, it times out even if its worker says nothing. Null while it waits for a worker,
    #: the first or the next.
    Column("run_deadline", Double),
    Column("worker_id", String(128)),
    #: JSON, or where it lies.
    Column("result", Text),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64)),
    #: When the reconciler has to act on it: send it, or tell the ledger of its cancel. Null: nothing to do.
    Column("due_at", Double),
    Column("sends", Integer, nullable=False),
    Column("sent_at", Double),
    #: The life of the store that it was last entered into.
    Column("store_epoch", String(32)),
    #: Taken back before anybody was told of it; invisible, and removed once the ledger has forgotten it.
    Column("withdrawn", Boolean, nullable=False),
    CheckConstraint(f"status IN ({_STATES})", name="known_status"),
    UniqueConstraint("owner", "idempotency_key", name="one_job_per_key"),
    # What lists filter by stands in the index itself: otherwise a filter that few jobs pass reads every row.
    Index("newest_of_owner", "owner", "created_at", "id", "status", "type", "region"),
    Index("newest", "created_at", "id", "status", "type", "region"),
    Index("due", "due_at", sqlite_where=text("due_at IS NOT NULL"), postgresql_where=text("due_at IS NOT NULL")),
    Index("queue_deadlines", "queue_deadline", sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE),
    Index("run_deadlines", "run_deadline", sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE),
    Index("epochs", "region", "store_epoch", sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE),
    Index("resends", "region", "type", "sent_at", sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE),
    Index("prunable", "completed_at", sqlite_where=_IS_WHOLE, postgresql_where=_IS_WHOLE),
    Index("oldest_queued", "region", "created_at", sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED),
    Index("queued_of_owner", "owner", sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(8), primary_key=True),
    Column("name", String(128), nullable=False),
    #: SHA-256 of the whole key in hex; its 256 random bits need no slow hash.
    Column("digest", String(64), nullable=False),
    Column("scopes", String(128), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    #: Whom its jobs belong to; keys that replace one another have the same.
    Column("owner", String(64), nullable=False),
)

#: Rows are only added (app/audit.py).
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Double, nullable=False),
    Column("actor", String(64)),
    Column("address", String(64)),
    Column("action", String(64), nullable=False),
    Column("target", String(512), nullable=False),
    Column("result", String(64), nullable=False),
    Index("audit_times", "at"),
)

#: One row: which control process leads, and until when.
leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Double, nullable=False),
)

#: One row: what tickets are signed with (app/tickets.py). Delete it for a new one; what runs then runs once more.
signing_key = Table(
    "signing_key",
    metadata,
    Column("id", Integer, primary_key=True),
    #: 256 random bits in hex.
    Column("secret", String(64), nullable=False),
)


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """Unix seconds by the database's clock."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **_: Any) -> str:
    # Not clock_timestamp(): that is volatile, and no index is searched by a volatile value.
    return "(extract(epoch from statement_timestamp())::double precision)"


def open_database(url: str, *, durable: bool = True) -> Engine:
    """An engine on which each statement is a transaction of its own.

    durable: a commit survives a power cut; without it, one that is lost with the power must only cost repeated work.

    Every change of a job is one compare-and-set, hence one statement: nothing here needs more. Errors do not quote
    parameters, which are prompts and answers.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(
            parsed,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            pool_size=16,
            max_overflow=16,
            pool_timeout=5,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 2},
        )
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        pool_size=16,
        max_overflow=16,
        pool_timeout=5,
        connect_args={"timeout": SQLITE_BUSY_S},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")

    return engine


def upgrade(url: str) -> None:
    """Bring the database to the newest migration."""
    engine = open_database(url)
    config = _alembic()
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()


def is_current(engine: Engine) -> bool:
    """Whether the database has every migration."""
    with engine.connect() as connection:
        heads = MigrationContext.configure(connection).get_current_heads()
    return set(heads) == set(ScriptDirectory.from_config(_alembic()).get_heads())


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parent.parent / "migrations"))
    return config
