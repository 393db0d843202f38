"""The API's side of a job: submit, look, wait, cancel, fold.

The order of things is what keeps a job: commit the row, enter it in the region's store, publish its message, mark the
row as sent. Whatever breaks off in between is done again by the reconciler (app/control.py), with the same calls.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Engine

from app import waiting
from app.backlog import MAX_UNSENT, Backlog
from app.blobs import Blobs
from app.job_table import JobRow
from app.links import Down, Link, Mailbox, mailboxes, open_links
from app.metering import Metering
from app.placement import Placement
from app.request import Request
from app.rows import Rows
from app.sent_marks import SentMarks
from app.tickets import Tickets
from app.turns import HeldBack, by_queue
from app.usage import read_meter
from app.waiting import Statistics
from engines.catalogue import JobType
from engines.contract import Progress
from tasks import logs, routing, tracing
from tasks.job import Envelope, Job, JobError, JobState
from tasks.records import Record, Standing
from tasks.routing import Region
from tasks.store import StoreError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

#: Its client's connection broke with the worker, and no one else has the job's params.
DIRECT_LOST = JobError("worker_lost", "Its client brought it to a worker, and that worker was lost.")
_POLL_S = 0.5
#: When to ask again while a region is away and no more jobs are held for it.
BACKLOG_RETRY_S = 5


class Unavailable(Exception):
    """The platform cannot take the job now; nothing of it was kept."""

    def __init__(self, code: str, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was accepted; replayed if an earlier request with the same idempotency key made it."""

    row: JobRow
    replayed: bool
    #: Where it stood as it was entered; None where that is not known.
    standing: Standing | None = None


def _of_its_job(
    method: Callable[Concatenate["Dispatch", JobRow, P], T],
) -> Callable[Concatenate["Dispatch", JobRow, P], T]:
    """The method, all of whose log lines are about the job of its row."""

    @wraps(method)
    def bound(self: "Dispatch", row: JobRow, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with logs.of_job(row.id):
            return method(self, row, *args, **kwargs)

    return bound


class Dispatch:
    """Takes jobs in and tells what became of them. Threads may share it."""

    def __init__(
        self,
        rows: Rows,
        links: Mapping[str, Link],
        default_region: str,
        blobs: Blobs,
        tickets: Tickets,
        max_unsent: int = MAX_UNSENT,
        fair_window: int = 0,
    ) -> None:
        """max_unsent: how many jobs are held for a region that takes none. fair_window: 0 lets keys take no turns."""
        self.rows = rows
        self._held = HeldBack(rows, fair_window)
        #: What this process counts of jobs.
        self.metering = Metering()
        self.tickets = tickets
        self._backlog = Backlog(rows, max_unsent)
        self._blobs = blobs
        self.links = links
        self.placement = Placement(links, default_region, self._held)
        self._marks = SentMarks(rows)

    def submit(
        self, owner: str, request: Request, *, idempotency_key: str | None = None, must_send: bool = False
    ) -> Submitted:
        """Accept a job: once this returns, it is kept, whatever breaks.

        must_send: raise Unavailable, and leave nothing behind, if its region does not take it at once.
        Raises Unavailable too if enough jobs are held for that region already. Raises IdempotencyConflict.
        """
        region = self.placement.decide(request, owner).region
        if not must_send and (why := self.links[region].away()) and not self._backlog.admit(region):
            if idempotency_key and (earlier := self.rows.earlier(owner, idempotency_key, request.fingerprint())):
                return Submitted(earlier, replayed=True)
            what = f"{why} {self._backlog.most} jobs wait for it already, which is as many as are held (MAX_UNSENT)."
            raise Unavailable("too_many_unsent", f"{what} Nothing was submitted.", BACKLOG_RETRY_S)
        held_for = self._held.queue_for(self.links[region], request.type, request.model, request.priority)
        text = json.dumps(request.params, separators=(",", ":"))
        job_id = str(uuid.uuid4())
        try:
            params = self._blobs.keep(text, job_id)
        except OSError as error:
            logger.error("the blob store does not take a job's params: %s", error)
            raise Unavailable("blobs_unavailable", "The store for large inputs does not answer.") from error
        try:
            row, new = self._insert(
                job_id, owner, request, region, params, idempotency_key, told_at_once=not must_send, held_for=held_for
            )
        except Exception:
            self._blobs.drop(params)
            raise
        if not new:
            self._blobs.drop(params)
            return Submitted(row, replayed=True)
        if row.held_for is not None:
            self._held.add(row)
            self.metering.accepted(row)
            return Submitted(row, replayed=False)
        self.links[region].expect(request.type, request.model, request.priority)
        standing = None
        try:
            with tracing.span("submit", job_id=row.id, type=row.type, region=row.region):
                standing = self.send(row, text)
        except Down as down:
            if must_send and self.rows.withdraw(row):
                raise Unavailable("region_unavailable", f"{down} Nothing was submitted.") from down
            with logs.of_job(row.id):
                logger.warning("job %s is held until its region answers: %s", row.id, down)
        self.metering.accepted(row)
        return Submitted(row, replayed=False, standing=standing)

    def _insert(
        self,
        job_id: str,
        owner: str,
        request: Request,
        region: str,
        params: str,
        idempotency_key: str | None,
        *,
        told_at_once: bool,
        held_for: str | None,
    ) -> tuple[JobRow, bool]:
        return self.rows.insert(
            job_id,
            owner=owner,
            type=request.type,
            model=request.model,
            requested_model=request.requested_model,
            params=params,
            priority=request.priority,
            region_wanted=self.placement.home(request),
            region=region,
            allow_cross_region=request.allow_cross_region,
            timeout_seconds=request.timeout_seconds,
            queue_timeout_seconds=request.queue_timeout_seconds,
            idempotency_key=idempotency_key,
            fingerprint=request.fingerprint() if idempotency_key else None,
            retry_of=request.retry_of,
            told_at_once=told_at_once,
            held_for=held_for,
        )

    def again(self, row: JobRow) -> Request | None:
        """What was asked for with the job, to ask for it once more; None once its input is no longer kept.

        Without its bound on the wait, which is over. Raises Unavailable where the input lies in a store that does not
        answer.
        """
        try:
            text = self._blobs.read(row.params) if row.pruned_at is None else None
        except FileNotFoundError:
            text = None
        except OSError as error:
            logger.error("job %s: its input cannot be read: %s", row.id, error)
            raise Unavailable("blobs_unavailable", "The store for large inputs does not answer.") from error
        if text is None:
            return None
        return Request(
            type=row.type,
            model=row.model,
            requested_model=row.requested_model,
            params=json.loads(text),
            priority=row.priority,
            region=row.region_wanted,
            allow_cross_region=row.allow_cross_region,
            # SQLite may return a whole number as an int, which would be another fingerprint.
            timeout_seconds=float(row.timeout_seconds),
            queue_timeout_seconds=None,
            retry_of=row.id,
        )

    @_of_its_job
    def send(self, row: JobRow, params: str | None = None) -> Standing | None:
        """Enter the row's attempt in its region's store and publish its message; where it stands. Raises Down.

        params: as JSON text, if they are at hand. A job whose params are gone ends here.
        """
        link = self._link(row)
        job = Job(row.id, row.type, row.attempt)
        try:
            params = params or self._blobs.read(row.params)
        except FileNotFoundError:
            self.end(row, JobState.FAILED, JobError("params_lost", "Its input is no longer in the store of inputs."))
            return None
        except OSError as error:
            raise Down(f"The store for large inputs does not answer: {type(error).__name__}.") from error
        ticket = self.tickets.sign(row.id, row.attempt, row.region)
        link.check_room(len(params))
        with link.mailbox.breaker:
            entered = link.mailbox.ledger.put(
                job,
                queue=routing.queue_name(row.region, row.type, row.model),
                model=row.model,
                priority=row.priority,
                params=params,
                timeout_s=row.timeout_seconds,
                beside=link.beside(row.type, row.model),
                ticket=ticket,
            )
        if entered.state == "queued":
            queue_name = routing.queue_name(row.region, row.type, row.model, pinned=not row.allow_cross_region)
            with tracing.span(
                "publish",
                parent=self._trace(row),
                kind="producer",
                job_id=row.id,
                attempt=row.attempt,
                queue=queue_name,
            ):
                traceparent = tracing.traceparent()
                if traceparent:
                    with link.mailbox.breaker:
                        link.mailbox.ledger.note_trace(row.id, traceparent)
                with link.broker.breaker:
                    link.broker.publisher.publish(job, queue=queue_name, priority=row.priority, traceparent=traceparent)
        else:
            self._meet(row, link)
        self._marks.add(row, entered.epoch)
        return entered.standing

    def _meet(self, row: JobRow, link: Link) -> None:
        """Bring a row and a record together of which the record is ahead. Raises Down.

        A row that is merely older than what has become of it since is left alone. One that an older backup of the
        database brought back has to go past what the store remembers, or it would wait for ever.
        """
        with link.mailbox.breaker:
            record = link.mailbox.ledger.look(row.id)
        if record is None or record.outcome is not None:
            self.fold(row, record, link.mailbox)
        elif record.state == "cancelled":
            self.rows.cancel(row.id)
        elif record.state == "ended" or record.attempt > row.attempt:
            self.rows.next_attempt(row.id, attempt=row.attempt, lost=False, to=record.attempt + 1)

    def look(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """The job with all that the ledger knows of it; None if there is none, or it is another owner's."""
        row = self.rows.get(job_id, owner)
        if row is None or row.ended:
            return row
        link = self.links.get(row.region)
        if link is None:
            return row
        try:
            with link.mailbox.breaker:
                record = link.mailbox.ledger.look(job_id)
        except Down:
            return row
        return self.fold(row, record)

    def adopt(self, job_id: str, record: Record) -> JobRow | None:
        """The row of a job that its client brought to the worker; None for a record of which nothing is known."""
        if record.direct is None:
            return None
        if not self.tickets.good(record.direct.ticket, job_id, 1, record.direct.region):
            logger.error("job %s: somebody made up a direct job in a store; it is ignored", job_id)
            return None
        row = self.rows.adopt(job_id, record.direct, worker_id=record.worker_id, started_at=record.started_at)
        if row is not None:
            self.metering.accepted(row)
        return row or self.rows.get(job_id)

    @_of_its_job
    def fold(self, row: JobRow, record: Record | None, mailbox: Mailbox | None = None) -> JobRow:
        """Copy what the ledger's record says into the row; the row as it is then, whoever wrote it.

        mailbox: where the record was found; by default that of the row's region. It may be of a region that the job has
        left: an outcome counts all the same, and nothing else does. One without a good ticket is refused.
        """
        if record is None or row.ended:
            return row
        changed: JobRow | None = None
        if (outcome := record.outcome) is not None:
            known = outcome.job_id == row.id
            if not known or not self.tickets.good(outcome.ticket, row.id, outcome.attempt, outcome.region):
                return self._refuse(row, record, mailbox)
            return self._end_with(row, outcome, record.started_at)
        if record.attempt != row.attempt:
            return row
        if record.state == "running" and (row.status is JobState.QUEUED or row.worker_id != record.worker_id):
            changed = self.rows.begun(
                row.id, attempt=record.attempt, worker_id=record.worker_id, started_at=record.started_at
            )
        elif record.state == "poison":
            error = JobError("worker_lost", "It was begun three times, and each time its worker was lost.")
            changed = self.rows.end(row.id, JobState.FAILED, error=error)
        elif record.state == "abandoned":
            changed = self.rows.end(row.id, JobState.FAILED, error=DIRECT_LOST)
        else:
            return row
        return changed or self.rows.get(row.id) or row

    def _refuse(self, row: JobRow, record: Record, mailbox: Mailbox | None) -> JobRow:
        """Drop an outcome that no worker of ours wrote; the job goes on, by its next attempt if its record is lost."""
        link = self.links.get(row.region)
        at_home = link is not None and mailbox in (None, link.mailbox)
        found_in = mailbox or (link.mailbox if link else None)
        if found_in is None:
            return row
        # What it says of itself is not repeated: somebody made it up.
        logger.error(
            "ALARM: job %s has a forged outcome in the %s, or one of a worker older than this API; it is ignored",
            *(row.id, found_in.breaker.name),
        )
        queue = routing.queue_name(row.region, row.type, row.model)
        try:
            with found_in.breaker:
                gone = found_in.ledger.refuse(row.id, record.said, queue=queue, worker_id=row.worker_id)
        except Down as down:
            logger.warning("job %s: its forged outcome stays for now: %s", row.id, down)
            return row
        if not gone or not at_home:
            return row
        return self.rows.next_attempt(row.id, attempt=row.attempt, lost=False) or self.rows.get(row.id) or row

    def _end_with(self, row: JobRow, outcome: Envelope, started_at: float | None) -> JobRow:
        kept = self._keep(outcome)
        meter = read_meter(outcome, row.type).encode()
        with tracing.span("fold", parent=self._trace(row), job_id=row.id, outcome=outcome.outcome):
            changed = self.rows.end_with(outcome, started_at=started_at, kept=kept, meter=meter)
        if changed is None:
            self._blobs.drop(kept or "")
            last = self.rows.get(row.id) or row
            if (last.status, last.worker_id) != (outcome.outcome, outcome.worker_id):
                logger.info("job %s: an outcome came too late and is dropped", row.id)
                self.metering.dropped(row)
            return last
        here, there = self.links.get(row.region), self.links.get(outcome.region)
        if here is not None and there is not None and here.mailbox is not there.mailbox:
            # It had moved, and the region that it left was faster: nobody needs to run it any more.
            try:
                with here.mailbox.breaker:
                    here.mailbox.ledger.cancel(row.id)
            except Down as down:
                logger.warning("job %s has ended in %s and may run in vain: %s", row.id, outcome.region, down)
        return changed

    def wait(self, row: JobRow, timeout_s: float) -> JobRow:
        """Block until the job has ended, wherever it moves meanwhile, for at most timeout_s; the row as it is then."""
        end = time.monotonic() + timeout_s
        while not row.ended and (left := end - time.monotonic()) > 0:
            try:
                mailbox = self._link(row).mailbox
                if mailbox.breaker.tripped:
                    raise Down(f"The {mailbox.breaker.name} does not answer.")
                record = mailbox.ledger.wait(row.id, left)
            except (StoreError, Down):
                record = None
                # The row is still there to be read.
                time.sleep(min(left, _POLL_S))
            row = self.fold(row, record) if record else self.look(row.id) or row
        return row

    def result(self, row: JobRow) -> dict[str, Any] | None:
        """What a completed job gave; None once it is pruned.

        Raises Unavailable where it lies in a store that does not answer.
        """
        try:
            return None if row.result is None else json.loads(self._blobs.read(row.result))
        except OSError as error:
            now = self.rows.get(row.id)
            if isinstance(error, FileNotFoundError) and (now is None or now.pruned_at is not None):
                # Retention was faster than this request.
                return None
            logger.error("job %s: its result cannot be read: %s", row.id, error)
            raise Unavailable("blobs_unavailable", "The store for large results does not answer.") from error

    def progress(self, row: JobRow) -> Progress | None:
        """How far a running job has come, as its worker last said; None where that is not known."""
        if row.status is not JobState.RUNNING:
            return None
        try:
            link = self._link(row)
            with link.mailbox.breaker:
                return link.mailbox.ledger.progress(row.id)
        except Down:
            return None

    @_of_its_job
    def cancel(self, row: JobRow) -> JobRow:
        """End the job as cancelled, unless it has ended; the row tells who was first."""
        changed = self.rows.cancel(row.id)
        if changed is None:
            return self.rows.get(row.id) or row
        self._try_to_tell(changed)
        return changed

    @_of_its_job
    def give_up(self, row: JobRow) -> JobRow:
        """End a job that waited too long, unless a worker has begun it; the row as it is then."""
        row = self.look(row.id) or row
        if row.status is not JobState.QUEUED:
            return row
        error = JobError("queue_timeout", "No worker began it within its queue time-out.")
        return self.end(row, JobState.TIMEOUT, error, status=JobState.QUEUED)

    @_of_its_job
    def end(self, row: JobRow, outcome: JobState, error: JobError, *, status: JobState | None = None) -> JobRow:
        """End a job whose worker says nothing, unless it has ended; the row as it is then."""
        changed = self.rows.end(row.id, outcome, error=error, status=status)
        if changed is None:
            return self.rows.get(row.id) or row
        logger.info("job %s: %s (%s)", row.id, outcome, error.code)
        self._try_to_tell(changed)
        return changed

    @_of_its_job
    def tell(self, row: JobRow) -> None:
        """Make the ledger drop a job that ended without a worker's report. Raises Down."""
        link = self.links.get(row.region)
        if link is not None:
            with link.mailbox.breaker:
                link.mailbox.ledger.cancel(row.id)
        if row.withdrawn:
            self.rows.remove(row.id)
            self._blobs.drop(row.params)
        else:
            self.rows.told(row.id)

    def held_back(self) -> Mapping[str, int]:
        """How many queued jobs are not in any broker yet, by queue, because it is not their key's turn."""
        return dict(by_queue(self._held.counts()))

    def statistics(self, region: str | None) -> Statistics:
        """Queues and workers of one region or of all; of one that cannot be reached, what the rows say.

        Raises Unavailable if none can be reached.
        """
        try:
            links = {region: self.links[region]} if region else self.links
            return waiting.statistics(links, self.rows, self.held_back())
        except Down as down:
            raise Unavailable("region_unavailable", str(down)) from down

    def check(self) -> dict[str, str | None]:
        """What is wrong with each region's broker and store; None where both answer."""
        found: dict[str, str | None] = {}
        for name, link in self.links.items():
            found[name] = None
            try:
                with link.mailbox.breaker:
                    link.mailbox.ledger.epoch()
                with link.broker.breaker:
                    link.broker.publisher.depths([routing.queue_name(name, JobType.LLM)])
            except Down as down:
                found[name] = str(down)
        return found

    def flush(self) -> None:
        """Mark in their rows what has been sent until now."""
        self._marks.flush()

    def close(self) -> None:
        """Write the last marks, and drop the connections."""
        self._marks.close()
        for publisher in {link.broker.publisher for link in self.links.values()}:
            publisher.close()

    def _link(self, row: JobRow) -> Link:
        """The way to the row's region. Raises Down for one that is no longer among the settings."""
        if row.region not in self.links:
            raise Down(f"Region {row.region} is not configured.")
        return self.links[row.region]

    def _keep(self, outcome: Envelope) -> str | None:
        if outcome.result is None:
            return None
        text = json.dumps(outcome.result, separators=(",", ":"))
        try:
            return self._blobs.keep(text, outcome.job_id)
        except OSError as error:
            # Rather a large row than an outcome that is lost.
            logger.error("job %s: its result stays in its row; the blob store: %s", outcome.job_id, error)
            return text

    def _try_to_tell(self, row: JobRow) -> None:
        try:
            self.tell(row)
        except Down as down:
            logger.warning("job %s is %s; its worker hears of it later: %s", row.id, row.status, down)

    def _trace(self, row: JobRow) -> str:
        """The span that sent the job first, where there are traces and no span of this process to go on from."""
        if not tracing.on() or tracing.traceparent():
            return ""
        # A job that moved has left it in the store of another region.
        for mailbox in mailboxes(self.links):
            try:
                with mailbox.breaker:
                    if found := mailbox.ledger.trace(row.id):
                        return found
            except Down:
                continue
        return ""


def open_dispatch(
    engine: Engine,
    regions: Mapping[str, Region],
    default_region: str,
    blobs_url: str,
    *,
    max_unsent: int = MAX_UNSENT,
    fair_window: int = 0,
) -> Dispatch:
    """A Dispatch on this database, these regions and this store of large texts.

    max_unsent: how many jobs are held for a region that takes none. fair_window: how many jobs of a queue are sent at
    the least before the keys' others wait for their turn, and for a control that gives it; 0 sends all at once. Nothing
    is connected before it is needed.
    """
    tickets = Tickets(engine)
    return Dispatch(
        Rows(engine), open_links(regions), default_region, Blobs(blobs_url), tickets, max_unsent, fair_window
    )
