"""The API's side of a job: submit, look, wait, cancel, fold.

The order of things is what keeps a job: commit the row, enter it in the region's store, publish its message, mark the
row as sent. Whatever breaks off in between is done again by the reconciler (app/control.py), with the same calls.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.blobs import Blobs
from app.links import Down, Link, open_links
from app.rows import IdempotencyConflict, JobRow, Rows, fingerprint_of
from engines import catalogue
from engines.catalogue import JobType, UnknownModel
from engines.contract import Progress
from tasks import routing
from tasks.fleet import Card
from tasks.job import Envelope, Job, JobError, JobState
from tasks.ledger import Record, StoreError
from tasks.routing import Load, Region

__all__ = [
    "Dispatch",
    "IdempotencyConflict",
    "Place",
    "Request",
    "Statistics",
    "Submitted",
    "Unavailable",
    "open_dispatch",
]

logger = logging.getLogger(__name__)

#: Sent jobs are marked in their rows this often, many in one write.
MARK_EVERY_S = 0.05
_POLL_S = 0.5


class Unavailable(Exception):
    """The platform cannot take the job now; nothing of it was kept."""

    def __init__(self, code: str, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for, validated."""

    type: JobType
    #: The catalogue's id of the model that must run it, and what the client called it; None for any model.
    model: str | None
    requested_model: str | None
    params: Mapping[str, Any]
    priority: int
    region: str | None
    allow_cross_region: bool
    timeout_seconds: float
    queue_timeout_seconds: float | None


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was accepted; replayed if an earlier request with the same idempotency key made it."""

    row: JobRow
    replayed: bool
    #: Its place in the queue as it was entered, 1 is next; None where that is not known.
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queued job stands; all None for one that no longer waits."""

    position: int | None = None
    estimated_wait_s: float | None = None
    #: A sentence on why it still waits.
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Queues and workers now."""

    total_queued: int
    available_workers: int
    #: Seconds that a new job of the slowest served type would wait; None where that is not known.
    estimated_wait_s: float | None
    by_type: Mapping[JobType, int]


class Dispatch:
    """Takes jobs in and tells what became of them. Threads may share it."""

    def __init__(self, rows: Rows, links: Mapping[str, Link], default_region: str, blobs: Blobs) -> None:
        self.rows = rows
        self._blobs = blobs
        self.links = links
        self._default_region = default_region
        self._marks = SentMarks(rows)

    def submit(
        self, owner: str, request: Request, *, idempotency_key: str | None = None, must_send: bool = False
    ) -> Submitted:
        """Accept a job: once this returns, it is kept, whatever breaks.

        must_send: raise Unavailable, and leave nothing behind, if its region does not take it at once.
        Raises IdempotencyConflict.
        """
        region = self._region_for(request)
        text = json.dumps(request.params, separators=(",", ":"))
        try:
            params = self._blobs.keep(text)
        except OSError as error:
            logger.error("the blob store does not take a job's params: %s", error)
            raise Unavailable("blobs_unavailable", "The store for large inputs does not answer.") from error
        try:
            row, new = self._insert(owner, request, region, params, idempotency_key, told_at_once=not must_send)
        except Exception:
            self._blobs.drop(params)
            raise
        if not new:
            self._blobs.drop(params)
            return Submitted(row, replayed=True)
        position = None
        try:
            position = self.send(row, text)
        except Down as down:
            if must_send and self.rows.withdraw(row.id):
                raise Unavailable("region_unavailable", f"{down} Nothing was submitted.") from down
            logger.warning("job %s is held until its region answers: %s", row.id, down)
        return Submitted(row, replayed=False, position=position)

    def _insert(
        self, owner: str, request: Request, region: str, params: str, idempotency_key: str | None, *, told_at_once: bool
    ) -> tuple[JobRow, bool]:
        return self.rows.insert(
            str(uuid.uuid4()),
            owner=owner,
            type=request.type,
            model=request.model,
            requested_model=request.requested_model,
            params=params,
            priority=request.priority,
            region_wanted=request.region,
            region=region,
            allow_cross_region=request.allow_cross_region,
            timeout_seconds=request.timeout_seconds,
            queue_timeout_seconds=request.queue_timeout_seconds,
            idempotency_key=idempotency_key,
            fingerprint=_fingerprint(request) if idempotency_key else None,
            told_at_once=told_at_once,
        )

    def send(self, row: JobRow, params: str | None = None) -> int | None:
        """Enter the row's attempt in its region's store and publish its message; the place it got. Raises Down.

        params: as JSON text, if they are at hand. A job whose params are gone ends here.
        """
        link = self.links[row.region]
        job = Job(row.id, row.type, row.attempt)
        try:
            params = params or self._blobs.read(row.params)
        except FileNotFoundError:
            self.end(row, JobState.FAILED, JobError("params_lost", "Its input is no longer in the store of inputs."))
            return None
        except OSError as error:
            raise Down(f"The store for large inputs does not answer: {type(error).__name__}.") from error
        with link.mailbox.breaker:
            entered = link.mailbox.ledger.put(
                job,
                queue=routing.queue_name(row.region, row.type, row.model),
                model=row.model,
                priority=row.priority,
                params=params,
                timeout_s=row.timeout_seconds,
            )
        if entered.state == "queued":
            queue_name = routing.queue_name(row.region, row.type, row.model, pinned=not row.allow_cross_region)
            with link.broker.breaker:
                link.broker.publisher.publish(job, queue=queue_name, priority=row.priority)
        self._marks.add(row, entered.epoch)
        return entered.position

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

    def fold(self, row: JobRow, record: Record | None) -> JobRow:
        """Copy what the ledger's record says into the row; the row as it is then, whoever wrote it."""
        if record is None or row.ended:
            return row
        changed: JobRow | None = None
        if record.outcome is not None:
            kept = self._keep(record.outcome)
            changed = self.rows.end_with(record.outcome, started_at=record.started_at, kept=kept)
            if changed is None:
                self._blobs.drop(kept or "")
                logger.info("job %s: an outcome came too late and is dropped", row.id)
        elif record.state == "running" and (row.status is JobState.QUEUED or row.worker_id != record.worker_id):
            changed = self.rows.begun(
                row.id, attempt=record.attempt, worker_id=record.worker_id, started_at=record.started_at
            )
        elif record.state == "poison":
            error = JobError("worker_lost", "It was begun three times, and each time its worker was lost.")
            changed = self.rows.end(row.id, JobState.FAILED, error=error)
        else:
            return row
        return changed or self.rows.get(row.id) or row

    def wait(self, row: JobRow, timeout_s: float) -> JobRow:
        """Block until the job has ended, for at most timeout_s; the row as it is then."""
        link = self.links[row.region]
        end = time.monotonic() + timeout_s
        while not row.ended and (left := end - time.monotonic()) > 0:
            try:
                record = link.mailbox.ledger.wait(row.id, left)
            except StoreError:
                record = None
                # The row is still there to be read.
                time.sleep(min(left, _POLL_S))
            row = self.fold(row, record) if record else self.look(row.id) or row
        return row

    def result(self, row: JobRow) -> dict[str, Any] | None:
        """What a completed job gave. Raises Unavailable where it lies in a store that does not answer."""
        try:
            return None if row.result is None else json.loads(self._blobs.read(row.result))
        except OSError as error:
            logger.error("job %s: its result cannot be read: %s", row.id, error)
            raise Unavailable("blobs_unavailable", "The store for large results does not answer.") from error

    def progress(self, row: JobRow) -> Progress | None:
        """How far a running job has come, as its worker last said; None where that is not known."""
        if row.status is not JobState.RUNNING:
            return None
        link = self.links[row.region]
        try:
            with link.mailbox.breaker:
                return link.mailbox.ledger.progress(row.id)
        except Down:
            return None

    def cards(self) -> list[Card]:
        """The live workers of every region that can be reached."""
        found = []
        for link in self.links.values():
            try:
                found += link.cards()
            except Down:
                continue
        return found

    def model_id(self, job_type: JobType, name: str) -> str:
        """The id of the model that a client means: a row of the catalogue, or what a live worker has loaded.

        Raises UnknownModel with the nearest names.
        """
        live = {
            card.models[job_type].casefold(): card.models[job_type] for card in self.cards() if job_type in card.models
        }
        try:
            return live.get(name.casefold()) or catalogue.find(job_type, name).id
        except UnknownModel as error:
            others = sorted(set(live.values()) - {row.id for row in catalogue.MODELS})
            raise UnknownModel(f"{error} Live: {', '.join(others)}." if others else str(error)) from None

    def cancel(self, row: JobRow) -> JobRow:
        """End the job as cancelled, unless it has ended; the row tells who was first."""
        changed = self.rows.cancel(row.id)
        if changed is None:
            return self.rows.get(row.id) or row
        self._try_to_tell(changed)
        return changed

    def give_up(self, row: JobRow) -> JobRow:
        """End a job that waited too long, unless a worker has begun it; the row as it is then."""
        row = self.look(row.id) or row
        if row.status is not JobState.QUEUED:
            return row
        error = JobError("queue_timeout", "No worker began it within its queue time-out.")
        return self.end(row, JobState.TIMEOUT, error, status=JobState.QUEUED)

    def end(self, row: JobRow, outcome: JobState, error: JobError, *, status: JobState | None = None) -> JobRow:
        """End a job whose worker says nothing, unless it has ended; the row as it is then."""
        changed = self.rows.end(row.id, outcome, error=error, status=status)
        if changed is None:
            return self.rows.get(row.id) or row
        logger.info("job %s: %s (%s)", row.id, outcome, error.code)
        self._try_to_tell(changed)
        return changed

    def tell(self, row: JobRow) -> None:
        """Make the ledger drop a job that ended without a worker's report. Raises Down."""
        link = self.links[row.region]
        with link.mailbox.breaker:
            link.mailbox.ledger.cancel(row.id)
        if row.withdrawn:
            self.rows.remove(row.id)
            self._blobs.drop(row.params)
        else:
            self.rows.told(row.id)

    def place(self, row: JobRow, position: int | None = None) -> Place:
        """A queued job's position, estimated wait, and why it waits; position: if it is known already."""
        if row.status is not JobState.QUEUED:
            return Place()
        link = self.links[row.region]
        try:
            load = link.load(row.type, row.model)
            if position is None:
                with link.mailbox.breaker:
                    position = link.mailbox.ledger.position(row.id, routing.queue_name(row.region, row.type, row.model))
        except Down:
            return Place(reason=f"Region {row.region} cannot be reached; the job is sent when it is back.")
        wait_s = None if position is None else routing.estimated_wait_s(position - 1, load)
        return Place(position, wait_s, _reason(row, load, position))

    def statistics(self, region: str | None) -> Statistics:
        """Queues and workers of one region or of all; a region that cannot be reached counts nothing.

        Raises Unavailable if none can be reached.
        """
        links = [self.links[region]] if region else list(self.links.values())
        by_type = dict.fromkeys(JobType, 0)
        waits: list[float] = []
        workers = reached = 0
        for link in links:
            try:
                workers += len(link.cards())
                for job_type, depth in link.depths().items():
                    by_type[job_type] += depth
                    wait_s = routing.estimated_wait_s(depth, link.load(job_type))
                    waits += [] if wait_s is None else [wait_s]
                reached += 1
            except Down as down:
                last = down
        if not reached:
            raise Unavailable("region_unavailable", str(last))
        return Statistics(sum(by_type.values()), workers, max(waits, default=None), by_type)

    def has_worker(self, request: Request) -> bool:
        """Whether a live worker may take such a job now."""
        wanted = request.region or self._default_region
        loads = self._loads(request.type, request.model)
        names = loads if request.allow_cross_region else [wanted]
        return any(loads[name].slots > 0 for name in names if name in loads)

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

    def _keep(self, outcome: Envelope) -> str | None:
        if outcome.result is None:
            return None
        text = json.dumps(outcome.result, separators=(",", ":"))
        try:
            return self._blobs.keep(text)
        except OSError as error:
            # Rather a large row than an outcome that is lost.
            logger.error("job %s: its result stays in its row; the blob store: %s", outcome.job_id, error)
            return text

    def _try_to_tell(self, row: JobRow) -> None:
        try:
            self.tell(row)
        except Down as down:
            logger.warning("job %s is %s; its worker hears of it later: %s", row.id, row.status, down)

    def _region_for(self, request: Request) -> str:
        wanted = request.region or self._default_region
        if not request.allow_cross_region:
            return wanted
        regions = {name: link.region for name, link in self.links.items()}
        return routing.choose_region(wanted, regions, self._loads(request.type, request.model), cross_region=True)

    def _loads(self, job_type: JobType, model: str | None) -> dict[str, Load]:
        loads = {}
        for name, link in self.links.items():
            try:
                loads[name] = link.load(job_type, model)
            except Down:
                continue
        return loads


class SentMarks:
    """Marks jobs as sent, many at once, after their clients have been answered.

    A mark that is lost with the process costs a second message, which the ledger answers with BUSY or DONE.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._sent: list[tuple[JobRow, str]] = []
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sent-marks", daemon=True)
        self._thread.start()

    def add(self, row: JobRow, epoch: str) -> None:
        """The row's attempt has been sent."""
        with self._lock:
            self._sent.append((row, epoch))
        self._some.set()

    def flush(self) -> None:
        """Write what has been added until now. Raises SQLAlchemyError; what was not written stays due."""
        with self._lock:
            sent, self._sent = self._sent, []
        by_epoch: dict[str, list[tuple[str, int]]] = {}
        for row, epoch in sent:
            by_epoch.setdefault(epoch, []).append((row.id, row.attempt))
        for epoch, jobs_sent in by_epoch.items():
            self._rows.sent(jobs_sent, epoch=epoch)

    def close(self) -> None:
        """Write what is left."""
        self._stop.set()
        self._some.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._some.wait()
            self._some.clear()
            self._stop.wait(MARK_EVERY_S)
            try:
                self.flush()
            except SQLAlchemyError as error:
                logger.warning("some sent jobs stay due and will be sent twice: %s", error)


def open_dispatch(engine: Engine, regions: Mapping[str, Region], default_region: str, blobs_url: str) -> Dispatch:
    """A Dispatch on this database, these regions and this store of large texts.

    Nothing is connected before it is needed.
    """
    return Dispatch(Rows(engine), open_links(regions), default_region, Blobs(blobs_url))


def _fingerprint(request: Request) -> str:
    """Of what is to be done; how long a client waits for it may differ when it asks again."""
    return fingerprint_of({key: value for key, value in asdict(request).items() if key != "queue_timeout_seconds"})


def _reason(row: JobRow, load: Load, position: int | None) -> str:
    if load.slots == 0:
        stays = "" if row.allow_cross_region else ", and it may not leave the region"
        what = row.type if row.model is None else f"{row.type} with {row.model}"
        return f"No live worker serves {what} in {row.region}{stays}."
    if position is None:
        return "It is on its way to a worker."
    if load.free == 0:
        return f"All {load.slots} slots for {row.type} in {row.region} are busy; {position - 1} jobs are before it."
    return f"A worker with a free slot takes it next; {position - 1} jobs are before it."
