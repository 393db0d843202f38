"""Every change of a job's row: each one statement that names the state it expects.

The row is the only truth of a job and its outbox. Zero changed rows mean that somebody else was faster; the loser's
outcome is dropped.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    String,
    bindparam,
    case,
    func,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy import delete as sql_delete
from sqlalchemy import insert as sql_insert
from sqlalchemy import update as sql_update
from sqlalchemy.exc import IntegrityError

from app.census import Census
from app.held import Held
from app.job_table import COLUMNS, IS_HELD, IS_LIVE, UNPROVEN_S, JobRow, JobTable, row_of
from app.leadership import Leadership
from app.remains import Remains
from app.tables import jobs, now
from engines.catalogue import JobType
from tasks import routing
from tasks.job import DirectJob, Envelope, JobError, JobState

#: A silent worker's job times out this much later than the worker itself would have ended it.
RUN_GRACE_S = 15.0


class IdempotencyConflict(Exception):
    """The idempotency key belongs to a job with another request."""


def fingerprint_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request in canonical form."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_QUEUED = jobs.c.status == str(JobState.QUEUED)
# Whatever its public state: no worker has begun its present attempt.
_WAITS = jobs.c.run_deadline.is_(None)
# Or to be sent: nobody but its worker has the params of a job that its client brought there.
_SENT = or_(jobs.c.sends > 0, jobs.c.due_at.is_not(None), jobs.c.held_for.is_not(None))
_started = bindparam("started", type_=Double)
# The store's clock may be behind the database's; nobody shall see a job start before it was made.
_STARTED_AT = case((jobs.c.created_at > _started, jobs.c.created_at), else_=func.coalesce(_started, now()))

# The statements of every single job are built once: building one costs more than SQLite takes to run it.
_GET = select(*COLUMNS).where(jobs.c.id == bindparam("job"), jobs.c.withdrawn.is_(False))
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
    .returning(*COLUMNS)
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
    .returning(*COLUMNS)
)
_BEGUN = (
    sql_update(jobs)
    .where(
        jobs.c.id == bindparam("job"),
        IS_LIVE,
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
    .returning(*COLUMNS)
)
_ENDED = (
    sql_update(jobs)
    .where(jobs.c.id == bindparam("job"), IS_LIVE)
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
    .returning(*COLUMNS)
)


class Rows:
    """Every job's row, from its submit to its end. Raises as JobTable does."""

    def __init__(self, engine: Engine) -> None:
        table = JobTable(engine)
        self._table = table
        self.held = Held(table)
        self.census = Census(table)
        self.remains = Remains(table)
        self.leadership = Leadership(table)
        #: A connection on which everything is one transaction.
        self.together = table.together

    # Reading

    def get(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """The job, if it exists and is the owner's; owner None is anybody's."""
        with self._table.engine.connect() as connection:
            found = connection.execute(_GET, {"job": job_id}).first()
        row = row_of(found) if found else None
        return row if row is None or owner is None or row.owner == owner else None

    def get_all(self, job_ids: Sequence[str]) -> dict[str, JobRow]:
        """The jobs there are, by id, withdrawn ones too."""
        with self._table.engine.connect() as connection:
            found = connection.execute(select(*COLUMNS).where(jobs.c.id.in_(job_ids)))
            return {row.id: row for row in map(row_of, found)}

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
        query = select(*COLUMNS).where(jobs.c.withdrawn.is_(False))
        wanted = {jobs.c.owner: owner, jobs.c.status: status, jobs.c.type: type, jobs.c.region: region}
        for column, value in wanted.items():
            if value is not None:
                query = query.where(column == str(value))
        if created_after is not None:
            query = query.where(jobs.c.created_at > created_after)
        if before is not None:
            # As a pair: spelled out with OR, it would read the index from its start on every page.
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*before))
        return self._table.some(query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()), limit)

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
                with self._table.writing(durable=told_at_once) as connection:
                    return row_of(connection.execute(_INSERT, values).one()), True
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
        query = select(*COLUMNS).where(jobs.c.owner == owner, jobs.c.idempotency_key == idempotency_key)
        with self._table.engine.connect() as connection:
            found = connection.execute(query).first()
        row = None if found is None else row_of(found)
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
            with self._table.writing(durable=False) as connection:
                return row_of(connection.execute(_ADOPT, values).one())
        except IntegrityError:
            return None

    def begun(self, job_id: str, *, attempt: int, worker_id: str | None, started_at: float | None) -> JobRow | None:
        """The worker has begun the attempt: queued -> running, or running on with another worker.

        None if there was nothing to change, or the race was lost.
        """
        values = {"job": job_id, "of_attempt": attempt, "worker": worker_id, "started": started_at}
        return self._table.returning(_BEGUN, values)

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
        return self._table.returning(_ENDED, values)

    def end(self, job_id: str, outcome: JobState, *, error: JobError, status: JobState | None = None) -> JobRow | None:
        """queued or running -> an outcome that no worker reported; the ledger is told afterwards (due at once).

        status: only if the job stands there.
        """
        expected = [] if status is None else [jobs.c.status == str(status)]
        return self._change(
            jobs.c.id == job_id,
            IS_LIVE,
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
            jobs.c.id == job_id, IS_LIVE, status=str(JobState.CANCELLED), completed_at=now(), due_at=now()
        )

    def next_attempt(self, job_id: str, *, attempt: int, lost: bool = True, to: int | None = None) -> JobRow | None:
        """The attempt is over without an outcome: the next one is due at once. The public state stays what it is.

        lost: its worker was lost, so it counts as a try. to: the number of the next attempt, if not one more.
        None too for a job that its client brought to the worker: it has none.
        """
        return self._change(
            jobs.c.id == job_id,
            IS_LIVE,
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
        begun = (IS_LIVE, jobs.c.region.in_(list(regions)), ~_WAITS, or_(jobs.c.sends > 0, jobs.c.due_at.is_not(None)))
        again = sql_update(jobs).where(*begun).values(version=jobs.c.version + 1, attempt=jobs.c.attempt + 1)
        return self._table.write(again.values(worker_id=None, run_deadline=None, due_at=now()))

    def given_back(self, row: JobRow) -> JobRow | None:
        """The worker gave the attempt back: it waits again, and is due at once. None if the row has changed since."""
        return self._change(
            jobs.c.id == row.id, IS_LIVE, jobs.c.version == row.version, worker_id=None, run_deadline=None, due_at=now()
        )

    def move(
        self, region: str, job_type: JobType, model: str | None, *, to: str, running: bool = False, limit: int
    ) -> list[JobRow]:
        """Move jobs that may leave the region to another, where they are due at once; as they are then, oldest first.

        The next attempt fences what lies in the region they left; a move is no try. running: those that a worker
        there has begun, instead of those that wait.
        """
        may_go = (
            IS_LIVE,
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
                held_for=case((IS_HELD, routing.queue_name(to, job_type, model)), else_=None),
                due_at=case((IS_HELD, None), else_=now()),
            )
        )
        with self._table.writing(durable=True) as connection:
            return [row_of(changed) for changed in connection.execute(statement.returning(*COLUMNS))]

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
        return self._change(jobs.c.id == job_id, IS_LIVE, held_for=None, due_at=now())

    def sent(self, jobs_sent: Iterable[tuple[str, int]], *, epoch: str) -> None:
        """The attempts of these (id, attempt) are entered in the store of that epoch, and their messages are out."""
        by_attempt: dict[int, list[str]] = {}
        for job_id, attempt in jobs_sent:
            by_attempt.setdefault(attempt, []).append(job_id)
        for attempt, ids in by_attempt.items():
            self._table.write(
                sql_update(jobs)
                .where(jobs.c.id.in_(ids), IS_LIVE, jobs.c.attempt == attempt)
                .values(due_at=None, sent_at=now(), sends=jobs.c.sends + 1, store_epoch=epoch)
            )

    def told(self, job_id: str) -> None:
        """The ledger knows of the end that no worker reported."""
        self._table.write(sql_update(jobs).where(jobs.c.id == job_id, ~IS_LIVE).values(due_at=None))

    def remove(self, job_id: str) -> None:
        """A withdrawn job that the ledger has forgotten leaves no trace."""
        self._table.write(sql_delete(jobs).where(jobs.c.id == job_id, jobs.c.withdrawn.is_(True)))

    def due(self, limit: int) -> list[JobRow]:
        """What the reconciler has to act on, most urgent first."""
        query = select(*COLUMNS).where(jobs.c.due_at <= now())
        return self._table.some(query.order_by(jobs.c.priority.desc(), jobs.c.created_at), limit)

    def postpone(self, regions: Iterable[str], seconds: float) -> None:
        """Try everything that is due in these regions again later: they cannot be reached."""
        due = (jobs.c.region.in_(list(regions)), jobs.c.due_at <= now())
        self._table.write(sql_update(jobs).where(*due).values(due_at=now() + seconds))

    # What the reconciler looks for

    def waited_too_long(self, limit: int) -> list[JobRow]:
        """Queued jobs past their queue deadline."""
        return self._table.some(select(*COLUMNS).where(IS_LIVE, _QUEUED, jobs.c.queue_deadline <= now()), limit)

    def ran_too_long(self, limit: int) -> list[JobRow]:
        """Running jobs past their run deadline and grace."""
        return self._table.some(select(*COLUMNS).where(IS_LIVE, jobs.c.run_deadline <= now()), limit)

    def of_other_epochs(self, region: str, epoch: str, limit: int) -> list[JobRow]:
        """Live jobs that were entered into an earlier life of the region's store, and are not due anyway."""
        entered = select(*COLUMNS).where(IS_LIVE, jobs.c.region == region, jobs.c.due_at.is_(None))
        # Two ranges, each a search of its own: <> uses no index, and for an OR of them SQLite reads the whole region.
        ranges = (jobs.c.store_epoch < epoch, jobs.c.store_epoch > epoch)
        return self._table.some(union_all(*(entered.where(other) for other in ranges)), limit)

    def entered(self, region: str, epoch: str, *, after: str, limit: int) -> list[JobRow]:
        """Live jobs that were entered into this life of the region's store, by id, from the first one after `after`."""
        here = (IS_LIVE, jobs.c.region == region, jobs.c.store_epoch == epoch, jobs.c.due_at.is_(None))
        return self._table.some(select(*COLUMNS).where(*here, jobs.c.id > after).order_by(jobs.c.id), limit)

    def long_unbegun(
        self, region: str, job_type: JobType, model: str | None, *, first_s: float, most_s: float, limit: int
    ) -> list[JobRow]:
        """Jobs whose present attempt was sent a while ago and that no worker has begun, oldest first.

        The wait grows with the square of that attempt's sends, up to most_s.
        """
        growing = first_s * jobs.c.sends * jobs.c.sends
        query = select(*COLUMNS).where(
            IS_LIVE,
            # Not the public state: a later attempt waits while its job is shown as running.
            _WAITS,
            jobs.c.region == region,
            jobs.c.type == str(job_type),
            jobs.c.model.is_not_distinct_from(model),
            jobs.c.sent_at < now() - case((growing > most_s, most_s), else_=growing),
            jobs.c.due_at.is_(None),
        )
        return self._table.some(query.order_by(jobs.c.sent_at), limit)

    # For the accounts of what has ended (app/ends.py)

    def note(self, connection: Connection, limit: int) -> list[JobRow]:
        """Mark ended jobs that nobody has marked yet as noted, withdrawn ones too; those, in no order."""
        unnoted = (jobs.c.noted_at.is_(None), jobs.c.completed_at.is_not(None))
        if connection.execute(select(jobs.c.id).where(*unnoted).limit(1)).first() is None:
            # Without the lock that even an update of no rows takes.
            return []
        some = select(jobs.c.id).where(*unnoted).order_by(jobs.c.completed_at).limit(limit).scalar_subquery()
        statement = sql_update(jobs).where(jobs.c.id.in_(some), *unnoted).values(noted_at=now())
        return [row_of(noted) for noted in connection.execute(statement.returning(*COLUMNS))]

    def _change(self, *conditions: ColumnElement[bool], **values: Any) -> JobRow | None:
        statement = sql_update(jobs).where(*conditions).values(version=jobs.c.version + 1, **values)
        return self._table.returning(statement.returning(*COLUMNS), {})


def _storable(words: str) -> str:
    """The words as every database takes them: PostgreSQL refuses NUL, and no driver takes half of a surrogate pair.

    Engines quote what clients sent; an outcome that cannot be stored would be folded again and again, for ever.
    """
    return words.replace("\0", "?").encode("utf-8", "replace").decode()
