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
    BigInteger,
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
_IS_UNNOTED = text("noted_at IS NULL AND completed_at IS NOT NULL")
_IS_UNCOUNTED = text("noted_at IS NULL")
_IS_HELD = text("status = 'queued' AND held_for IS NOT NULL")
_IS_TO_BE_SENT = text("next_at IS NOT NULL")

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
    #: When its end was handed to whoever keeps account of ends (app/ends.py).
    Column("noted_at", Double),
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
    #: The job that it runs again, which may be deleted by now.
    Column("retry_of", String(36)),
    #: When the reconciler has to act on it: send it, or tell the ledger of its cancel. Null: nothing to do.
    Column("due_at", Double),
    Column("sends", Integer, nullable=False),
    Column("sent_at", Double),
    #: The life of the store that it was last entered into.
    Column("store_epoch", String(32)),
    #: The queue that it is held back from until it is its key's turn (app/turns.py); null once it may be sent.
    Column("held_for", String(352)),
    #: What it used, as JSON (app/usage.py); null where no worker said.
    Column("meter", Text),
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
    Index("unnoted", "completed_at", sqlite_where=_IS_UNNOTED, postgresql_where=_IS_UNNOTED),
    Index("unnoted_of_owner", "owner", sqlite_where=_IS_UNCOUNTED, postgresql_where=_IS_UNCOUNTED),
    Index(
        "held",
        *("held_for", "priority", "owner", "created_at"),
        sqlite_where=_IS_HELD,
        postgresql_where=_IS_HELD,
    ),
    Index("oldest_queued", "region", "type", "created_at", sqlite_where=_IS_QUEUED, postgresql_where=_IS_QUEUED),
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
    #: How many turns it has for each turn of a key of weight 1, and what it may use, as JSON; keys of one owner have
    #: the same.
    Column("weight", Integer, nullable=False, server_default="1"),
    Column("quotas", Text, nullable=False, server_default="{}"),
)

#: What each owner used on each day (app/usage.py).
usage = Table(
    "usage",
    metadata,
    Column("owner", String(64), primary_key=True),
    #: Of the jobs' ends, in days since 1970 by UTC.
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("type", String(16), primary_key=True),
    #: The model that ran; else the one that was asked for, '' for any.
    Column("model", String(255), primary_key=True),
    #: Jobs, by what became of them.
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
    Column("timeout", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("images", BigInteger, nullable=False),
    Column("audio_s", Double, nullable=False),
    Column("gpu_s", Double, nullable=False),
    Index("usage_days", "day"),
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


#: Where a key's owner wants to hear of the ends of jobs (app/webhooks.py).
webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("description", String(255), nullable=False),
    #: What it hears of, with commas between: `job.completed,job.failed`, and of which job types; empty for all.
    Column("events", String(255), nullable=False),
    Column("job_types", String(255), nullable=False),
    #: What deliveries are signed with, as `whsec_` and base64: no digest would do.
    Column("secret", String(128), nullable=False),
    #: The one before, and until when it signs too.
    Column("old_secret", String(128)),
    Column("old_secret_until", Double),
    Column("enabled", Boolean, nullable=False),
    #: Why it is not, where nobody asked for it.
    Column("disabled_reason", Text),
    #: Since when no delivery has arrived; null while they do.
    Column("failing_since", Double),
    Column("created_at", Double, nullable=False),
    Index("webhooks_of_owner", "owner"),
)

#: What is or was to be told to a webhook; the log of it, and the outbox.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    #: Made of the webhook's and the job's: there is one for each end.
    Column("id", String(36), primary_key=True),
    Column("webhook_id", String(36), nullable=False),
    #: Null for a test.
    Column("job_id", String(36)),
    Column("event", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(16), nullable=False),
    #: Tries since it was made or replayed.
    Column("tries", SmallInteger, nullable=False),
    #: The newest attempts as JSON (app/deliveries.py).
    Column("log", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    #: When it is tried next; while one process tries it, when another one may.
    Column("next_at", Double),
    #: Whose try counts.
    Column("claim", String(32)),
    Index("newest_of_webhook", "webhook_id", "created_at", "id"),
    Index(
        "deliveries_due",
        "webhook_id",
        "next_at",
        sqlite_where=_IS_TO_BE_SENT,
        postgresql_where=_IS_TO_BE_SENT,
    ),
    Index("oldest_deliveries", "created_at"),
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
