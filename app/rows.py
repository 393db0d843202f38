"""Every change of a job's row: each one statement that names the state it expects.

The row is the only truth of a job and its outbox. Zero changed rows mean that somebody else was faster; the loser's
outcome is dropped.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    String,
    and_,
    bindparam,
    case,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy import delete as sql_delete
from sqlalchemy import insert as sql_insert
from sqlalchemy import update as sql_update
from sqlalchemy.exc import IntegrityError

from app.blobs import MARK
from app.tables import jobs, leadership, now, open_database
from engines.catalogue import JobType
from tasks import routing
from tasks.job import LIVE, DirectJob, Envelope, JobError, JobState

#: A job whose publish nobody proved is sent by the reconciler after this long.
UNPROVEN_S = 2.0
#: A silent worker's job times out this much later than the worker itself would have ended it.
RUN_GRACE_S = 15.0


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


@dataclass(frozen=True, slots=True)
class Traces:
    """What a job has elsewhere than in its row."""

    job_id: str
    live: bool
    #: What its row holds in place of texts that lie in the blob store.
    blobs: Sequence[str]


class IdempotencyConflict(Exception):
    """The idempotency key belongs to a job with another request."""


def fingerprint_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request in canonical form."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_COLUMNS = [jobs.c[field.name] for field in fields(JobRow)]
# Written into the statement, not bound: a bound value would not match the condition of a partial index.
_LIVE = jobs.c.status.in_(bindparam("live", [str(state) for state in LIVE], expanding=True, literal_execute=True))
_QUEUED = jobs.c.status == str(JobState.QUEUED)
# Likewise, for the index of queued jobs alone.
_INDEXED_QUEUED = jobs.c.status == bindparam("queued", str(JobState.QUEUED), literal_execute=True)
# Whatever its public state: no worker has begun its present attempt.
_WAITS = jobs.c.run_deadline.is_(None)
# Texts that lie elsewhere, without reading those that do not.
_TRACES = [
    jobs.c.id,
    jobs.c.status,
    *(case((column.startswith(MARK), column)) for column in (jobs.c.params, jobs.c.result)),
]
# Or to be sent: nobody but its worker has the params of a job that its client brought there.
_SENT = or_(jobs.c.sends > 0, jobs.c.due_at.is_not(None), jobs.c.held_for.is_not(None))
_HELD = jobs.c.held_for.is_not(None)
_started = bindparam("started", type_=Double)
# The store's clock may be behind the database's; nobody shall see a job start before it was made.
_STARTED_AT = case((jobs.c.created_at > _started, jobs.c.created_at), else_=func.coalesce(_started, now()))

# The statements of every single job are built once: building one costs more than SQLite takes to run it.
_GET = select(*_COLUMNS).where(jobs.c.id == bindparam("job"), jobs.c.withdrawn.is_(False))
_INSERT = (
    sql_insert(jobs)
    .values(
        id=bindparam("id"),
        owner=bindparam("owner"),
        type=bindparam("type"),
        model=bindparam("model"),
        requested_model=bindparam("requested_model"),
        params=bindparam("params"),
        priority=bindparam("priority"),
        region_wanted=bindparam("region_wanted"),
        region=bindparam("region"),
        allow_cross_region=bindparam("allow_cross_region"),
        timeout_seconds=bindparam("timeout_seconds"),
        idempotency_key=bindparam("idempotency_key"),
        fingerprint=bindparam("fingerprint"),
        retry_of=bindparam("retry_of"),
        status=str(JobState.QUEUED),
        attempt=1,
        version=1,
        created_at=now(),
        queue_deadline=now() + bindparam("queue_timeout_seconds", type_=Double),
        held_for=bindparam("held_for", type_=String),
        # What is held is not due: nobody sends it before its turn.
        due_at=case((bindparam("held_for", type_=String).is_(None), now() + UNPROVEN_S), else_=None),
        sends=0,
        withdrawn=False,
    )
    .returning(*_COLUMNS)
)
# The ticket is not kept: it can be signed again.
_DIRECT = [field.name for field in fields(DirectJob) if field.name != "ticket"]
_ADOPT = (
    sql_insert(jobs)
    .values(
        **{name: bindparam(name) for name in ("id", "params", *_DIRECT)},
        status=str(JobState.RUNNING),
        worker_id=bindparam("worker"),
        attempt=1,
        version=1,
        created_at=func.coalesce(_started, now()),
        started_at=func.coalesce(_started, now()),
        run_deadline=func.coalesce(_started, now()) + bindparam("timeout_seconds", type_=Double) + RUN_GRACE_S,
        sends=0,
        withdrawn=False,
    )
    .returning(*_COLUMNS)
)
_BEGUN = (
    sql_update(jobs)
    .where(
        jobs.c.id == bindparam("job"),
        _LIVE,
        jobs.c.attempt == bindparam("of_attempt"),
        # Running already: another worker has it now, after one that was lost or gave it back.
        or_(_QUEUED, jobs.c.worker_id.is_distinct_from(bindparam("worker"))),
    )
    .values(
        version=jobs.c.version + 1,
        status=str(JobState.RUNNING),
        worker_id=bindparam("worker"),
        started_at=func.coalesce(jobs.c.started_at, _STARTED_AT),
        # Each attempt has its whole time.
        run_deadline=_STARTED_AT + jobs.c.timeout_seconds + RUN_GRACE_S,
        # due_at stays: that it was sent, and into which life of the store, is for sent() to write.
    )
    .returning(*_COLUMNS)
)
_ENDED = (
    sql_update(jobs)
    .where(jobs.c.id == bindparam("job"), _LIVE)
    .values(
        version=jobs.c.version + 1,
        status=bindparam("outcome"),
        worker_id=bindparam("worker"),
        region=bindparam("in_region"),
        started_at=func.coalesce(jobs.c.started_at, _STARTED_AT),
        completed_at=now(),
        result=bindparam("answer"),
        error_code=bindparam("code"),
        error_message=bindparam("message"),
        meter=bindparam("used"),
        due_at=None,
    )
    .returning(*_COLUMNS)
)


class Rows:
    """The jobs table. Raises sqlalchemy.exc.OperationalError when the database is away or locked for too long."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # For writes that nobody has been told of: what the power takes away is done again, and no one waits for the
        # disk. Any later durable commit makes them durable too.
        self._hasty = engine
        if engine.dialect.name == "sqlite":
            self._hasty = open_database(engine.url.render_as_string(hide_password=False), durable=False)
        # SQLite has one writer at a time; threads of one process queue here instead of polling for its lock.
        self._turn: Any = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    # Reading

    def get(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """The job, if it exists and is the owner's; owner None is anybody's."""
        with self._engine.connect() as connection:
            found = connection.execute(_GET, {"job": job_id}).first()
        row = _row(found) if found else None
        return row if row is None or owner is None or row.owner == owner else None

    def get_all(self, job_ids: Sequence[str]) -> dict[str, JobRow]:
        """The jobs there are, by id, withdrawn ones too."""
        with self._engine.connect() as connection:
            found = connection.execute(select(*_COLUMNS).where(jobs.c.id.in_(job_ids)))
            return {row.id: row for row in map(_row, found)}

    def page(
        self,
        owner: str | None,
        *,
        status: JobState | None = None,
        type: JobType | None = None,
        region: str | None = None,
        created_after: float | None = None,
        limit: int = 50,
        before: tuple[float, str] | None = None,
    ) -> list[JobRow]:
        """Jobs, newest first; before: the (created_at, id) of the last one already seen."""
        query = select(*_COLUMNS).where(jobs.c.withdrawn.is_(False))
        wanted = {jobs.c.owner: owner, jobs.c.status: status, jobs.c.type: type, jobs.c.region: region}
        for column, value in wanted.items():
            if value is not None:
                query = query.where(column == str(value))
        if created_after is not None:
            query = query.where(jobs.c.created_at > created_after)
        if before is not None:
            # As a pair: spelled out with OR, it would read the index from its start on every page.
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*before))
        return self._some(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()), limit)

    # A job's life

    def insert(
        self,
        job_id: str,
        *,
        owner: str,
        type: JobType,
        model: str | None,
        requested_model: str | None,
        params: str,
        priority: int,
        region_wanted: str | None,
        region: str,
        allow_cross_region: bool,
        timeout_seconds: float,
        queue_timeout_seconds: float | None,
        idempotency_key: str | None,
        fingerprint: str | None,
        retry_of: str | None = None,
        held_for: str | None = None,
        told_at_once: bool = True,
    ) -> tuple[JobRow, bool]:
        """The new job, or the one that the owner's idempotency key already made; True if it is new.

        held_for: the queue that it waits for until it is released.
        told_at_once: the client hears of the job before it has ended, so it must survive a power cut from now on.
        Raises IdempotencyConflict if that one had another fingerprint.
        """
        values = {
            "id": job_id,
            "owner": owner,
            "type": str(type),
            "model": model,
            "requested_model": requested_model,
            "params": params,
            "priority": priority,
            "region_wanted": region_wanted,
            "region": region,
            "allow_cross_region": allow_cross_region,
            "timeout_seconds": timeout_seconds,
            "queue_timeout_seconds": queue_timeout_seconds,
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
            "retry_of": retry_of,
            "held_for": held_for,
        }
        found = None
        while found is None:
            try:
                with self._turn, (self._engine if told_at_once else self._hasty).connect() as connection:
                    return _row(connection.execute(_INSERT, values).one()), True
            except IntegrityError:
                if idempotency_key is None:
                    raise
            # None if it was withdrawn in between, and its key with it.
            found = self.earlier(owner, idempotency_key, fingerprint)
        return found, False

    def earlier(self, owner: str, idempotency_key: str, fingerprint: str | None) -> JobRow | None:
        """The job that the owner's idempotency key made; from now on it cannot be withdrawn.

        Raises IdempotencyConflict if it had another fingerprint.
        """
        query = select(*_COLUMNS).where(jobs.c.owner == owner, jobs.c.idempotency_key == idempotency_key)
        with self._engine.connect() as connection:
            found = connection.execute(query).first()
        row = None if found is None else _row(found)
        if row is not None and row.fingerprint != fingerprint:
            raise IdempotencyConflict
        if row is not None and row.status is JobState.QUEUED and row.sends == 0:
            # Whoever made it may not have sent it yet, and take it back; another client is about to be told of it.
            return self._change(jobs.c.id == row.id, jobs.c.withdrawn.is_(False))
        return row

    def adopt(
        self, job_id: str, direct: DirectJob, *, worker_id: str | None, started_at: float | None
    ) -> JobRow | None:
        """The row of a job that its client brought to a worker, as running; made while it runs or afterwards.

        None if there is one already. It holds no params and is never sent to anybody; what became of the job is folded
        into it as into any other.
        """
        stated = asdict(direct)
        values = {
            **{name: stated[name] for name in _DIRECT},
            "id": job_id,
            "type": str(direct.type),
            "params": "{}",
            "worker": worker_id,
            "started": started_at,
        }
        try:
            with self._turn, self._hasty.connect() as connection:
                return _row(connection.execute(_ADOPT, values).one())
        except IntegrityError:
            return None

    def begun(self, job_id: str, *, attempt: int, worker_id: str | None, started_at: float | None) -> JobRow | None:
        """The worker has begun the attempt: queued -> running, or running on with another worker.

        None if there was nothing to change, or the race was lost.
        """
        values = {"job": job_id, "of_attempt": attempt, "worker": worker_id, "started": started_at}
        return self._returning(_BEGUN, values)

    def end_with(
        self, envelope: Envelope, *, started_at: float | None, kept: str | None = None, meter: str | None = None
    ) -> JobRow | None:
        """queued or running -> what a worker says became of it; None if the job had ended before.

        kept: what the row is to hold in place of the result, where that lies elsewhere. meter: what it used.
        """
        error = envelope.error
        values = {
            "job": envelope.job_id,
            "outcome": str(envelope.outcome),
            "worker": envelope.worker_id,
            "in_region": envelope.region,
            "started": started_at,
            "answer": kept or (None if envelope.result is None else json.dumps(envelope.result, separators=(",", ":"))),
            "code": error.code if error else None,
            "message": _storable(error.message) if error else None,
            "used": meter,
        }
        return self._returning(_ENDED, values)

    def end(self, job_id: str, outcome: JobState, *, error: JobError, status: JobState | None = None) -> JobRow | None:
        """queued or running -> an outcome that no worker reported; the ledger is told afterwards (due at once).

        status: only if the job stands there.
        """
        expected = [] if status is None else [jobs.c.status == str(status)]
        return self._change(
            jobs.c.id == job_id,
            _LIVE,
            *expected,
            status=str(outcome),
            completed_at=now(),
            due_at=now(),
            error_code=error.code,
            error_message=error.message,
        )

    def cancel(self, job_id: str) -> JobRow | None:
        """queued or running -> cancelled; the ledger is told afterwards (due at once)."""
        return self._change(
            jobs.c.id == job_id, _LIVE, status=str(JobState.CANCELLED), completed_at=now(), due_at=now()
        )

    def next_attempt(self, job_id: str, *, attempt: int, lost: bool = True, to: int | None = None) -> JobRow | None:
        """The attempt is over without an outcome: the next one is due at once. The public state stays what it is.

        lost: its worker was lost, so it counts as a try. to: the number of the next attempt, if not one more.
        None too for a job that its client brought to the worker: it has none.
        """
        return self._change(
            jobs.c.id == job_id,
            _LIVE,
            _SENT,
            jobs.c.attempt == attempt,
            attempt=max(to or 0, attempt + 1),
            losses=jobs.c.losses + int(lost),
            sends=0,
            worker_id=None,
            run_deadline=None,
            held_for=None,
            due_at=now(),
        )

    def run_again(self, regions: Iterable[str]) -> int:
        """The next attempt of every job that a worker has begun in these regions is due at once; how many those are."""
        begun = (_LIVE, jobs.c.region.in_(list(regions)), ~_WAITS, or_(jobs.c.sends > 0, jobs.c.due_at.is_not(None)))
        again = sql_update(jobs).where(*begun).values(version=jobs.c.version + 1, attempt=jobs.c.attempt + 1)
        return self._write(again.values(worker_id=None, run_deadline=None, due_at=now()))

    def given_back(self, row: JobRow) -> JobRow | None:
        """The worker gave the attempt back: it waits again, and is due at once. None if the row has changed since."""
        return self._change(
            jobs.c.id == row.id, _LIVE, jobs.c.version == row.version, worker_id=None, run_deadline=None, due_at=now()
        )

    def move(
        self, region: str, job_type: JobType, model: str | None, *, to: str, running: bool = False, limit: int
    ) -> list[JobRow]:
        """Move jobs that may leave the region to another, where they are due at once; as they are then, oldest first.

        The next attempt fences what lies in the region they left; a move is no try. running: those that a worker
        there has begun, instead of those that wait.
        """
        may_go = (
            _LIVE,
            jobs.c.region == region,
            jobs.c.allow_cross_region.is_(True),
            jobs.c.withdrawn.is_(False),
            _SENT,
            ~_WAITS if running else _WAITS,
        )
        some = (
            select(jobs.c.id)
            .where(*may_go, jobs.c.type == str(job_type), jobs.c.model.is_not_distinct_from(model))
            .order_by(jobs.c.sent_at)
            .limit(limit)
        )
        # The conditions stand in both places: PostgreSQL looks only at the outer ones again when a row was changed
        # by somebody else meanwhile.
        statement = (
            sql_update(jobs)
            .where(jobs.c.id.in_(some.scalar_subquery()), *may_go)
            .values(
                version=jobs.c.version + 1,
                region=to,
                attempt=jobs.c.attempt + 1,
                worker_id=None,
                run_deadline=None,
                # What is held waits for its turn there, too.
                held_for=case((_HELD, routing.queue_name(to, job_type, model)), else_=None),
                due_at=case((_HELD, None), else_=now()),
            )
        )
        with self._turn, self._engine.connect() as connection:
            return [_row(changed) for changed in connection.execute(statement.returning(*_COLUMNS))]

    def withdraw(self, row: JobRow) -> bool:
        """Take back a job that nobody was told of; False if it is no longer as its insert() gave it."""
        changed = self._change(
            jobs.c.id == row.id,
            _QUEUED,
            jobs.c.version == row.version,
            status=str(JobState.CANCELLED),
            completed_at=now(),
            due_at=now(),
            withdrawn=True,
            idempotency_key=None,
        )
        return changed is not None

    # The outbox

    def send_again(self, job_id: str) -> JobRow | None:
        """Make a live job due now."""
        return self._change(jobs.c.id == job_id, _LIVE, held_for=None, due_at=now())

    def sent(self, jobs_sent: Iterable[tuple[str, int]], *, epoch: str) -> None:
        """The attempts of these (id, attempt) are entered in the store of that epoch, and their messages are out."""
        by_attempt: dict[int, list[str]] = {}
        for job_id, attempt in jobs_sent:
            by_attempt.setdefault(attempt, []).append(job_id)
        for attempt, ids in by_attempt.items():
            self._write(
                sql_update(jobs)
                .where(jobs.c.id.in_(ids), _LIVE, jobs.c.attempt == attempt)
                .values(due_at=None, sent_at=now(), sends=jobs.c.sends + 1, store_epoch=epoch)
            )

    def told(self, job_id: str) -> None:
        """The ledger knows of the end that no worker reported."""
        self._write(sql_update(jobs).where(jobs.c.id == job_id, ~_LIVE).values(due_at=None))

    def remove(self, job_id: str) -> None:
        """A withdrawn job that the ledger has forgotten leaves no trace."""
        self._write(sql_delete(jobs).where(jobs.c.id == job_id, jobs.c.withdrawn.is_(True)))

    def due(self, limit: int) -> list[JobRow]:
        """What the reconciler has to act on, most urgent first."""
        query = select(*_COLUMNS).where(jobs.c.due_at <= now())
        return self._some(query.order_by(jobs.c.priority.desc(), jobs.c.created_at), limit)

    def postpone(self, regions: Iterable[str], seconds: float) -> None:
        """Try everything that is due in these regions again later: they cannot be reached."""
        due = (jobs.c.region.in_(list(regions)), jobs.c.due_at <= now())
        self._write(sql_update(jobs).where(*due).values(due_at=now() + seconds))

    def unsent(self, region: str, most: int) -> int:
        """How many live jobs of the region are not proven to be sent, counted up to `most`; reads as many rows."""
        some = select(jobs.c.id).where(_LIVE, jobs.c.region == region, jobs.c.due_at.is_not(None)).limit(most)
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(some.subquery())).scalar_one())

    # What is held until it is its key's turn (app/turns.py)

    def held(self) -> dict[tuple[str, int, str], int]:
        """How many jobs are held, by queue, priority and owner; reads an index of them."""
        query = select(jobs.c.held_for, jobs.c.priority, jobs.c.owner, func.count()).where(_INDEXED_QUEUED, _HELD)
        with self._engine.connect() as connection:
            found = connection.execute(query.group_by(jobs.c.held_for, jobs.c.priority, jobs.c.owner))
            return {(queue, priority, owner): count for queue, priority, owner, count in found}

    def held_model(self, queue: str) -> str | None:
        """The model that the jobs name which are held for the queue; None for any."""
        with self._engine.connect() as connection:
            query = select(jobs.c.model).where(_INDEXED_QUEUED, jobs.c.held_for == queue).limit(1)
            model: str | None = connection.execute(query).scalar()
        return model

    def held_before(self, row: JobRow, most: int) -> int:
        """How many held jobs of the same owner and queue are released before this one, counted up to `most`."""
        own = (_INDEXED_QUEUED, jobs.c.held_for == row.held_for, jobs.c.owner == row.owner)
        earlier = and_(jobs.c.priority == row.priority, jobs.c.created_at < row.created_at)
        some = select(literal(1)).where(*own, or_(jobs.c.priority > row.priority, earlier)).limit(most)
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(some.subquery())).scalar_one())

    def release(self, queue: str, priority: int, owner: str, limit: int) -> list[JobRow]:
        """Hold the owner's next jobs no longer: those are to be sent now, in this order, and are due if nobody does."""
        held = (
            _INDEXED_QUEUED,
            jobs.c.held_for == queue,
            jobs.c.priority == priority,
            jobs.c.owner == owner,
        )
        some = select(jobs.c.id).where(*held).order_by(jobs.c.created_at).limit(limit).scalar_subquery()
        statement = sql_update(jobs).where(jobs.c.id.in_(some), *held)
        statement = statement.values(version=jobs.c.version + 1, held_for=None, due_at=now() + UNPROVEN_S)
        with self._turn, self._hasty.connect() as connection:
            released = [_row(found) for found in connection.execute(statement.returning(*_COLUMNS))]
        return sorted(released, key=lambda row: row.created_at)

    # What the reconciler looks for

    def waited_too_long(self, limit: int) -> list[JobRow]:
        """Queued jobs past their queue deadline."""
        return self._some(select(*_COLUMNS).where(_LIVE, _QUEUED, jobs.c.queue_deadline <= now()), limit)

    def ran_too_long(self, limit: int) -> list[JobRow]:
        """Running jobs past their run deadline and grace."""
        return self._some(select(*_COLUMNS).where(_LIVE, jobs.c.run_deadline <= now()), limit)

    def of_other_epochs(self, region: str, epoch: str, limit: int) -> list[JobRow]:
        """Live jobs that were entered into an earlier life of the region's store, and are not due anyway."""
        entered = select(*_COLUMNS).where(_LIVE, jobs.c.region == region, jobs.c.due_at.is_(None))
        # Two ranges, each a search of its own: <> uses no index, and for an OR of them SQLite reads the whole region.
        ranges = (jobs.c.store_epoch < epoch, jobs.c.store_epoch > epoch)
        return self._some(union_all(*(entered.where(other) for other in ranges)), limit)

    def entered(self, region: str, epoch: str, *, after: str, limit: int) -> list[JobRow]:
        """Live jobs that were entered into this life of the region's store, by id, from the first one after `after`."""
        here = (_LIVE, jobs.c.region == region, jobs.c.store_epoch == epoch, jobs.c.due_at.is_(None))
        return self._some(select(*_COLUMNS).where(*here, jobs.c.id > after).order_by(jobs.c.id), limit)

    def long_unbegun(
        self, region: str, job_type: JobType, model: str | None, *, first_s: float, most_s: float, limit: int
    ) -> list[JobRow]:
        """Jobs whose present attempt was sent a while ago and that no worker has begun, oldest first.

        The wait grows with the square of that attempt's sends, up to most_s.
        """
        growing = first_s * jobs.c.sends * jobs.c.sends
        query = select(*_COLUMNS).where(
            _LIVE,
            # Not the public state: a later attempt waits while its job is shown as running.
            _WAITS,
            jobs.c.region == region,
            jobs.c.type == str(job_type),
            jobs.c.model.is_not_distinct_from(model),
            jobs.c.sent_at < now() - case((growing > most_s, most_s), else_=growing),
            jobs.c.due_at.is_(None),
        )
        return self._some(query.order_by(jobs.c.sent_at), limit)

    def movable(self, region: str) -> list[tuple[JobType, str | None]]:
        """Types and models of the region's live jobs that may leave it; reads them all."""
        query = select(jobs.c.type, jobs.c.model).distinct()
        query = query.where(_LIVE, jobs.c.region == region, jobs.c.allow_cross_region.is_(True))
        with self._engine.connect() as connection:
            return [(JobType(job_type), model) for job_type, model in connection.execute(query)]

    def regions(self) -> list[str]:
        """Every region that live jobs are in; reads an index of them."""
        with self._engine.connect() as connection:
            return list(connection.execute(select(jobs.c.region).where(_LIVE).distinct()).scalars())

    # For the accounts of what has ended (app/ends.py)

    @contextmanager
    def together(self) -> Iterator[Connection]:
        """A connection on which everything is one transaction; for what no client was told of."""
        level: Any = "SERIALIZABLE" if self._hasty.dialect.name == "sqlite" else "READ COMMITTED"
        opened = self._hasty.connect().execution_options(isolation_level=level)
        with self._turn, opened as connection, connection.begin():
            yield connection

    def note(self, connection: Connection, limit: int) -> list[JobRow]:
        """Mark ended jobs that nobody has marked yet as noted, withdrawn ones too; those, in no order."""
        unnoted = (jobs.c.noted_at.is_(None), jobs.c.completed_at.is_not(None))
        if connection.execute(select(jobs.c.id).where(*unnoted).limit(1)).first() is None:
            # Without the lock that even an update of no rows takes.
            return []
        some = select(jobs.c.id).where(*unnoted).order_by(jobs.c.completed_at).limit(limit).scalar_subquery()
        statement = sql_update(jobs).where(jobs.c.id.in_(some), *unnoted).values(noted_at=now())
        return [_row(noted) for noted in connection.execute(statement.returning(*_COLUMNS))]

    # For the statistics

    def oldest_waits(self, regions: Iterable[str]) -> dict[tuple[str, JobType], float]:
        """Seconds that the oldest queued job of each region and type has waited, where any does."""
        queues = [(region, job_type) for region in regions for job_type in JobType]
        waits = [
            select(now() - jobs.c.created_at)
            .where(_INDEXED_QUEUED, jobs.c.region == region, jobs.c.type == str(job_type))
            .order_by(jobs.c.created_at)
            .limit(1)
            .scalar_subquery()
            for region, job_type in queues
        ]
        with self._engine.connect() as connection:
            found = connection.execute(select(*waits)).one()
        return {queue: wait for queue, wait in zip(queues, found, strict=True) if wait is not None}

    def pulse(self) -> dict[str, float | None]:
        """When a job was last accepted, and when one last ended, unix seconds: as long as both stay, no job is new."""
        newest = select(jobs.c.created_at).order_by(jobs.c.created_at.desc()).limit(1).scalar_subquery()
        ended = select(func.max(jobs.c.completed_at)).where(jobs.c.pruned_at.is_(None)).scalar_subquery()
        with self._engine.connect() as connection:
            accepted_at, ended_at = connection.execute(select(newest, ended)).one()
        return {"accepted_at": accepted_at, "ended_at": ended_at}

    def overdue_s(self) -> float:
        """By how many seconds the job that the reconciler has to act on first is overdue; 0 where none is."""
        # Ordered by the index, which min() would not use on every database.
        first = select(now() - jobs.c.due_at).where(jobs.c.due_at.is_not(None)).order_by(jobs.c.due_at).limit(1)
        with self._engine.connect() as connection:
            return max(connection.execute(first).scalar() or 0.0, 0.0)

    def live(self, region: str) -> dict[tuple[JobType, JobState], int]:
        """How many live jobs the region has, by type and state; reads them all."""
        query = select(jobs.c.type, jobs.c.status, func.count()).where(_LIVE, jobs.c.region == region)
        with self._engine.connect() as connection:
            found = connection.execute(query.group_by(jobs.c.type, jobs.c.status))
            return {(JobType(job_type), JobState(status)): count for job_type, status, count in found}

    # Retention

    def prunable(self, older_than_s: float, limit: int) -> list["Traces"]:
        """Jobs that ended so long ago and still hold params or a result, oldest first."""
        old = jobs.c.completed_at <= now() - older_than_s
        return self._traces(
            select(*_TRACES).where(jobs.c.pruned_at.is_(None), old).order_by(jobs.c.completed_at), limit
        )

    def prune(self, job_ids: Sequence[str]) -> None:
        """Delete the params and results of jobs that have ended; the rest of the row stays."""
        ended = (jobs.c.id.in_(job_ids), ~_LIVE, jobs.c.pruned_at.is_(None))
        self._write(sql_update(jobs).where(*ended).values(params="{}", result=None, pruned_at=now()))

    def outdated(self, older_than_s: float, limit: int) -> list["Traces"]:
        """Jobs that ended so long ago and whose end was noted (app/ends.py), oldest first."""
        # No job ends before it is made, so the index of the newest jobs finds them.
        ended_before = jobs.c.completed_at <= now() - older_than_s
        old = (jobs.c.created_at <= now() - older_than_s, ended_before, jobs.c.noted_at.is_not(None))
        return self._traces(select(*_TRACES).where(*old).order_by(jobs.c.created_at, jobs.c.id), limit)

    def delete(self, job_ids: Sequence[str]) -> None:
        """Delete jobs that have ended."""
        self._write(sql_delete(jobs).where(jobs.c.id.in_(job_ids), ~_LIVE))

    def traces(self, job_ids: Sequence[str]) -> dict[str, "Traces"]:
        """What is left of these jobs elsewhere, by id; jobs that have no row are left out."""
        found = self._traces(select(*_TRACES).where(jobs.c.id.in_(job_ids)), len(job_ids))
        return {traces.job_id: traces for traces in found}

    def _traces(self, query: Any, limit: int) -> list["Traces"]:
        with self._engine.connect() as connection:
            found = connection.execute(query.limit(limit))
            return [
                Traces(job_id, JobState(status) in LIVE, tuple(filter(None, kept))) for job_id, status, *kept in found
            ]

    def led_until(self) -> float | None:
        """Until when whoever led last was to lead, in unix seconds; None if nobody ever did."""
        with self._engine.connect() as connection:
            until: float | None = connection.execute(select(leadership.c.until)).scalar()
        return until

    def lead(self, holder: str, seconds: float) -> bool:
        """Whether `holder` leads for the next seconds: it did before, or nobody does."""
        until = now() + seconds
        free = or_(leadership.c.holder == holder, leadership.c.until < now())
        if self._write(sql_update(leadership).where(leadership.c.id == 1, free).values(holder=holder, until=until)):
            return True
        try:
            self._write(sql_insert(leadership).values(id=1, holder=holder, until=until))
        except IntegrityError:
            return False
        return True

    def _change(self, *conditions: ColumnElement[bool], **values: Any) -> JobRow | None:
        statement = sql_update(jobs).where(*conditions).values(version=jobs.c.version + 1, **values)
        return self._returning(statement.returning(*_COLUMNS), {})

    def _returning(self, statement: Any, values: Mapping[str, Any]) -> JobRow | None:
        with self._turn, self._engine.connect() as connection:
            changed = connection.execute(statement, values).first()
        return _row(changed) if changed else None

    def _write(self, statement: Any) -> int:
        """For what no client sees."""
        with self._turn, self._hasty.connect() as connection:
            return int(connection.execute(statement).rowcount)

    def _some(self, query: Any, limit: int) -> list[JobRow]:
        with self._engine.connect() as connection:
            return [_row(found) for found in connection.execute(query.limit(limit))]


def _storable(words: str) -> str:
    """The words as every database takes them: PostgreSQL refuses NUL, and no driver takes half of a surrogate pair.

    Engines quote what clients sent; an outcome that cannot be stored would be folded again and again, for ever.
    """
    return words.replace("\0", "?").encode("utf-8", "replace").decode()


def _row(found: Any) -> JobRow:
    values = dict(found._mapping)
    values["type"] = JobType(values["type"])
    values["status"] = JobState(values["status"])
    return JobRow(**values)
