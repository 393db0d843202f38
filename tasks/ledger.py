"""The live record of every job in its region's store: who may run it, who does, and what came of it.

Every change is one Lua script, so it happens whole or not at all. The fence is the attempt together with the worker
that began it: whoever no longer matches both cannot write. The SQL row remains the truth; all of this can be lost.

Keys of a region's store:
    job:{id}          hash    state, attempt, worker, params, timeout_s, outcome, cancel, deliveries, progress, and its
                              place: wait, score
    wait:{queue}      zset    queued jobs of a region and type (and model), by priority and arrival: position, depth
    queues            hash    every queue that jobs were entered for, and the model it is for, or ''
    lease:{worker}    string  a worker's card; gone 10 s after its last beat
    workers           zset    every worker seen, by its last beat
    running:{worker}  set     the jobs it runs
    news              zset    jobs whose record changed since it was last copied into the row, by sequence
    done:{id}         list    what sync waiters block on: when it started, and the envelope
    speed:{queue}     hash    running mean of the seconds a completed job took
    epoch             string  made once per life of the store: another value means that everything was lost
"""

import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from engines.contract import Progress
from tasks.job import MAX_ATTEMPTS, Envelope, Job, JobState

logger = logging.getLogger(__name__)

LEASE_S = 10.0
BEAT_S = 2.0
#: How long an outcome that nobody folded is kept.
OUTCOME_TTL_S = 24 * 3600
#: How long the mark of a cancelled or folded job stays, for messages and submits that come late.
TOMBSTONE_TTL_S = 600
#: Params and results that are longer than this, in characters, go by a client with more patience.
BULK_CHARS = 256 * 1024
#: One blocking wait; the record is looked at again between two of them.
WAIT_SLICE_S = 5.0

StoreError = redis.RedisError


class Answer(StrEnum):
    """What begin() tells a worker that holds a message."""

    #: Run it: the attempt is yours.
    RUN = "RUN"
    #: It has an outcome already.
    DONE = "DONE"
    #: Its owner no longer wants it.
    CANCELLED = "CANCELLED"
    #: The message is of an older attempt, or of a job this store does not know.
    STALE = "STALE"
    #: A worker that is alive runs it.
    BUSY = "BUSY"
    #: It has been delivered too often: it may be what kills its workers.
    POISON = "POISON"


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to begin(); params and timeout with RUN only."""

    answer: Answer
    params: Mapping[str, Any]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Entered:
    """The answer to put(): the record's state, the place in the queue (1 is next) and the store's epoch."""

    state: str
    position: int | None
    epoch: str


@dataclass(frozen=True, slots=True)
class Queued:
    """One queue: how many jobs wait there, and the model it is for; None for any."""

    depth: int
    model: str | None


@dataclass(frozen=True, slots=True)
class Record:
    """A job's live record as fold() needs it."""

    state: str
    attempt: int
    worker_id: str | None
    #: Unix seconds by the store's clock.
    started_at: float | None
    outcome: Envelope | None


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to beat(), as job ids."""

    cancelled: Sequence[str]
    lost: Sequence[str]
    ghosts: Sequence[str]


def open_store(url: str, *, timeout_s: float, block_s: float = 0.0) -> redis.Redis:
    """A client that gives up after timeout_s, plus block_s for blocking reads, instead of waiting for a dead server."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s + block_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        decode_responses=True,
        # A retry would wait for the same dead server again; callers decide what a failure means.
        retry=Retry(NoBackoff(), 0),
    )


class Ledger:
    """One region's live records. Raises StoreError from every method when the store does not answer in time."""

    def __init__(self, store: redis.Redis, waiting: redis.Redis | None = None, bulk: redis.Redis | None = None) -> None:
        """waiting: a client for wait(), whose socket timeout exceeds WAIT_SLICE_S.

        bulk: a client for megabytes, whose socket timeout is that of a whole transfer.
        """
        self.store = store
        self._waiting = waiting
        self._bulk = bulk or store
        scripts = {path.stem: path.read_text() for path in (Path(__file__).parent / "lua").glob("*.lua")}
        self._run = {name: store.register_script(text) for name, text in scripts.items()}

    # The API's side

    def put(
        self, job: Job, *, queue: str, model: str | None = None, priority: int, params: str, timeout_s: float
    ) -> Entered:
        """Enter the attempt as queued, with its params as JSON text; a record that knows better is left alone.

        model: the one that the queue is for.
        """
        state, place, epoch = self._run["put"](
            keys=[f"job:{job.id}", f"wait:{queue}", "seq", "epoch", "queues"],
            args=[job.id, job.attempt, 9 - priority, params, timeout_s, uuid.uuid4().hex, queue, model or ""],
            client=self._client_for(params),
        )
        return Entered(state, place + 1 if place >= 0 else None, epoch)

    def look(self, job_id: str) -> Record | None:
        """The record, or None where the store has none."""
        fields = self.store.hmget(f"job:{job_id}", "state", "attempt", "worker", "started", "outcome")
        return _record(cast(list[str | None], fields))

    def look_all(self, job_ids: Sequence[str]) -> dict[str, Record]:
        """The records there are, by job id, in one round trip."""
        pipe = self.store.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(f"job:{job_id}", "state", "attempt", "worker", "started", "outcome")
        found = ((job_id, _record(fields)) for job_id, fields in zip(job_ids, pipe.execute(), strict=True))
        return {job_id: record for job_id, record in found if record is not None}

    def cancel(self, job_id: str) -> None:
        """Drop the job if it waits, stop it if it runs, and keep it from being entered late."""
        self._run["cancel"](keys=[f"job:{job_id}", f"done:{job_id}"], args=[job_id, TOMBSTONE_TTL_S])

    def wait(self, job_id: str, timeout_s: float) -> Record | None:
        """Block until the job has an outcome, for at most one slice; None if none came, or a cancel did."""
        if self._waiting is None:
            raise ValueError("This ledger was opened without a client for waiting.")
        done = f"done:{job_id}"
        # Rotating the token in place wakes any number of waiters and leaves it for those that come later.
        slice_s = max(min(timeout_s, WAIT_SLICE_S), 0.01)
        said = cast(str | None, self._waiting.blmove(done, done, slice_s, "LEFT", "LEFT"))  # type: ignore[arg-type]
        if not said:
            return None
        started, _, text = said.partition(" ")
        envelope = _envelope(text)
        if envelope is None:
            return None
        return Record("ended", envelope.attempt, envelope.worker_id, int(started) / 1000 if started else None, envelope)

    def position(self, job_id: str, queue: str) -> int | None:
        """The job's place in its queue, 1 is next; None if it does not wait there."""
        rank = self.store.zrank(f"wait:{queue}", job_id)
        return None if rank is None else int(cast(int, rank)) + 1

    def queues(self) -> dict[str, Queued]:
        """Every queue that jobs were ever entered for, by name."""
        models = cast(dict[str, str], self.store.hgetall("queues"))
        pipe = self.store.pipeline(transaction=False)
        for queue in models:
            pipe.zcard(f"wait:{queue}")
        depths = pipe.execute() if models else []
        return {
            queue: Queued(depth, model or None) for (queue, model), depth in zip(models.items(), depths, strict=True)
        }

    def progress(self, job_id: str) -> Progress | None:
        """How far a running job has come, as its worker last said."""
        said = cast(str | None, self.store.hget(f"job:{job_id}", "progress"))
        if not said:
            return None
        done, total, unit = said.split(" ", 2)
        return Progress(int(done), int(total) if total else None, unit)

    def speeds(self, queues: Sequence[str]) -> dict[str, float]:
        """Running mean of a job's seconds, for the queues that have completed one."""
        pipe = self.store.pipeline(transaction=False)
        for queue in queues:
            pipe.hget(f"speed:{queue}", "mean_s")
        return {queue: float(mean) for queue, mean in zip(queues, pipe.execute(), strict=True) if mean is not None}

    # The reconciler's side

    def epoch(self) -> str:
        """The store's present life; made now if it has none."""
        self.store.set("epoch", uuid.uuid4().hex, nx=True)
        return str(self.store.get("epoch"))

    def news(self, limit: int) -> tuple[list[str], float]:
        """Ids of records that changed, oldest first, and the mark to settle() once they are in their rows."""
        changed = cast(list[tuple[str, float]], self.store.zrange("news", 0, limit - 1, withscores=True))
        return [job_id for job_id, _ in changed], changed[-1][1] if changed else 0.0

    def settle(self, mark: float) -> None:
        """Forget the news up to the mark; a record that changed again since has a later one and stays."""
        self.store.zremrangebyscore("news", "-inf", mark)

    def forget(self, job_ids: Iterable[str]) -> None:
        """Drop what the rows now hold; the bare record stays a while to answer late messages."""
        pipe = self.store.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hdel(f"job:{job_id}", "outcome", "params")
            pipe.expire(f"job:{job_id}", TOMBSTONE_TTL_S)
        pipe.execute()

    def orphans(self) -> list[tuple[str, str]]:
        """(worker id, job id) of every job whose worker's lease has ended."""
        workers = cast(list[str], self.store.zrange("workers", 0, -1))
        if not workers:
            return []
        pipe = self.store.pipeline(transaction=False)
        for worker in workers:
            pipe.exists(f"lease:{worker}")
            pipe.smembers(f"running:{worker}")
        answers = pipe.execute()
        dead = [
            (worker, jobs)
            for worker, alive, jobs in zip(workers, answers[::2], answers[1::2], strict=True)
            if not alive
        ]
        empty = [worker for worker, jobs in dead if not jobs]
        if empty:
            self.store.zrem("workers", *empty)
        return [(worker, job_id) for worker, jobs in dead for job_id in jobs]

    def bury(self, worker_id: str, job_id: str) -> None:
        """The job is no longer the dead worker's; its row has been dealt with."""
        self.store.srem(f"running:{worker_id}", job_id)

    # The worker's side

    def begin(self, job: Job, *, worker_id: str, token: str) -> Claim:
        """Ask for the attempt. The same token gets the same answer, so a lost answer can be asked for again."""
        answer, *rest = self._run["begin"](
            keys=[f"job:{job.id}", "seq", "news"], args=[job.id, job.attempt, worker_id, token, MAX_ATTEMPTS]
        )
        if answer != Answer.RUN:
            return Claim(Answer(answer), {}, 0.0)
        return Claim(Answer.RUN, json.loads(rest[0]), float(rest[1]))

    def finish(self, envelope: Envelope, *, queue: str) -> bool:
        """Hand in an outcome, and wake everyone who waits for it; False if the attempt is no longer ours."""
        ran = envelope.run_s if envelope.outcome is JobState.COMPLETED else ""
        text = envelope.encode()
        return bool(
            self._run["finish"](
                client=self._client_for(text),
                keys=[
                    f"job:{envelope.job_id}",
                    "seq",
                    "news",
                    f"running:{envelope.worker_id}",
                    f"celery-task-meta-{envelope.job_id}",
                    f"done:{envelope.job_id}",
                    f"speed:{queue}",
                ],
                args=[
                    envelope.job_id,
                    envelope.attempt,
                    envelope.worker_id,
                    text,
                    _celery_result(envelope),
                    OUTCOME_TTL_S,
                    ran,
                ],
            )
        )

    def release(self, job: Job, *, worker_id: str) -> bool:
        """Give the attempt back, uncounted; the reconciler sends it to another worker."""
        keys = [f"job:{job.id}", "seq", "news", f"running:{worker_id}"]
        return bool(self._run["release"](keys=keys, args=[job.id, job.attempt, worker_id]))

    def beat(self, worker_id: str, card: str, running: Sequence[str]) -> Heard:
        """Renew the lease, show the card, and hear of cancels and of jobs that were taken away."""
        cancelled, lost, ghosts = self._run["beat"](
            keys=[f"lease:{worker_id}", "workers", f"running:{worker_id}"],
            args=[worker_id, int(LEASE_S * 1000), card, *running],
        )
        return Heard(cancelled, lost, ghosts)

    def tell(self, worker_id: str, progress: Mapping[str, Progress]) -> None:
        """Show how far jobs have come that the worker holds, by job id."""
        said = [
            word
            for job_id, event in progress.items()
            for word in (job_id, f"{event.done} {'' if event.total is None else event.total} {event.unit}")
        ]
        self._run["tell"](keys=[], args=[worker_id, *said])

    def retire(self, worker_id: str) -> None:
        """End the lease now; what the worker still held is taken over at once."""
        self.store.delete(f"lease:{worker_id}")

    def cards(self) -> list[str]:
        """The cards of all workers whose lease is alive."""
        workers = cast(list[str], self.store.zrange("workers", 0, -1))
        if not workers:
            return []
        cards = cast(list[str | None], self.store.mget([f"lease:{worker}" for worker in workers]))
        return [card for card in cards if card is not None]

    def _client_for(self, text: str) -> redis.Redis:
        if len(text) <= BULK_CHARS or self._bulk is self.store:
            return self.store
        # A dead server is found out by the client that does not wait for it.
        self.store.ping()
        return self._bulk


def _record(fields: list[str | None]) -> Record | None:
    state, attempt, worker, started, outcome = fields
    if state is None:
        return None
    return Record(
        state=state,
        attempt=int(attempt or 0),
        worker_id=worker,
        started_at=int(started) / 1000 if started else None,
        outcome=_envelope(outcome) if outcome else None,
    )


def _envelope(text: str) -> Envelope | None:
    """None for what no worker of ours wrote: one such record must not hold up all the others."""
    try:
        return Envelope.decode(text)
    except (ValueError, TypeError, KeyError) as error:
        logger.error("an outcome in the store cannot be read and is ignored: %s", type(error).__name__)
        return None


def _celery_result(envelope: Envelope) -> str:
    """Celery's own result entry, so that AsyncResult(job_id) and Flower agree with us; it never holds the answer.

    Source: celery/backends/base.py, Backend._get_result_meta and prepare_exception.
    """
    result: dict[str, Any] = {"job_id": envelope.job_id, "status": envelope.outcome}
    state = "SUCCESS"
    if envelope.outcome is not JobState.COMPLETED:
        state = "REVOKED" if envelope.outcome is JobState.CANCELLED else "FAILURE"
        kind = {JobState.CANCELLED: "TaskRevokedError", JobState.TIMEOUT: "TimeLimitExceeded"}
        code = envelope.error.code if envelope.error else str(envelope.outcome)
        result = {
            "exc_type": kind.get(envelope.outcome, "JobFailed"),
            "exc_message": [code],
            "exc_module": "tasks.job" if envelope.outcome is JobState.FAILED else "celery.exceptions",
        }
    return json.dumps(
        {
            "status": state,
            "result": result,
            "traceback": None,
            "children": [],
            "date_done": datetime.fromtimestamp(time.time(), UTC).isoformat(),
            "task_id": envelope.job_id,
        }
    )
