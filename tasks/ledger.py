"""The live record of every job in its region's store: who may run it, who does, and what came of it.

Every change is one Lua script, so it happens whole or not at all. The fence is the attempt together with the worker
that began it: whoever no longer matches both cannot write. The SQL row remains the truth; all of this can be lost.

Keys of a region's store:
    job:{id}          hash    state, attempt, worker, params, timeout_s, outcome, cancel, deliveries, progress, and its
                              place: wait, score, begun; or direct, if its client brought it to the worker; lost, once
                              its worker's lease has ended and until the next attempt is entered
    wait:{queue}      zset    queued jobs of a region and type (and model), by priority and arrival: position, depth
    begun:{queue}     zset    jobs of it that run, by when they began in unix milliseconds
    queues            hash    every queue that jobs were entered for, and the model it is for, or ''
    lease:{worker}    string  a worker's card; gone 10 s after its last beat
    workers           zset    every worker that beats, by its last beat; it leaves when its jobs have been taken over
    running:{worker}  set     the jobs it runs
    ended             set     workers that gave their lease up; they leave like those whose lease ran out
    cards             hash    the last card of every worker that beats or is lost
    lost              zset    workers that left without a word, by their last beat; shown for a day
    names             hash    which worker came last under each name
    orders            hash    by name: workers that must take no new jobs, also after a restart, and when they were last
                              there, in unix seconds
    reliability:{name} hash   a worker's good outcomes and faults, fading; gone after eight half-lives
    news              zset    jobs whose record changed since it was last copied into the row, by sequence
    done:{id}         list    what sync waiters block on: when it started, and the envelope
    events:{id}       stream  what a run says, and its end: id is when it began and the entry's number; tasks/stream.py
    speed:{queue}     hash    running mean of the seconds a completed job took, of a type and of each model that ran;
                              gone after 30 days without one
    direct:secret     string  what the tokens of direct mode are signed with
    discarded, forged         outcomes that came too late, and that no worker of ours wrote, counted
    trace:{id}        string  the span that sent the job first, as a traceparent; only where traces are on
    epoch             string  made once per life of the store: another value means that everything was lost
    led               string  until when the database said that control leads: one that says less is an older copy
"""

import json
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import redis

from engines.contract import Progress
from tasks import reliability, routing
from tasks.job import MAX_ATTEMPTS, DirectJob, Envelope, Job, JobState
from tasks.presence import LEASE_S, LOST_TTL_S, Presence
from tasks.records import Answer, Claim, Entered, Queued, Record, Said, Standing, Traffic
from tasks.store import scripts

logger = logging.getLogger(__name__)

#: How long an outcome that nobody folded is kept.
OUTCOME_TTL_S = 24 * 3600
#: How long the trace of a job is known; what happens to it later is in a trace of its own.
TRACE_TTL_S = 24 * 3600
#: How long the mark of a cancelled or folded job stays, for messages and submits that come late.
TOMBSTONE_TTL_S = 600
#: Params and results that are longer than this, in characters, go by a client with more patience.
BULK_CHARS = 256 * 1024
#: Entries of what a job says; a run writes its own so slowly that they suffice (tasks/stream.py).
MOST_ENTRIES = 10_000
#: How long they are kept after the last one, and after the job's end.
EVENTS_TTL_S = 3600
ENDED_EVENTS_TTL_S = 60
#: One blocking wait; the record is looked at again between two of them.
WAIT_SLICE_S = 5.0
_SCRIPTS = (
    *("put", "stand", "cancel", "refuse", "withdraw", "orphans", "bury"),
    *("begin", "enter", "tell", "finish", "release"),
)

T = TypeVar("T")


class Ledger:
    """One region's live records. Raises StoreError from every method when the store does not answer in time."""

    def __init__(self, store: redis.Redis, waiting: redis.Redis | None = None, bulk: redis.Redis | None = None) -> None:
        """waiting: a client for wait(), whose socket timeout exceeds WAIT_SLICE_S.

        bulk: a client for megabytes, whose socket timeout is that of a whole transfer.
        """
        self.store = store
        self._waiting = waiting
        self._bulk = bulk or store
        self._run = scripts(store, _SCRIPTS)
        #: The workers of the region.
        self.presence = Presence(store)

    # The API's side

    def put(
        self,
        job: Job,
        *,
        queue: str,
        model: str | None = None,
        priority: int,
        params: str,
        timeout_s: float,
        beside: Sequence[str] = (),
        ticket: str = "",
    ) -> Entered:
        """Enter the attempt as queued, with its params as JSON text; a record that knows better is left alone.

        model: the one that the queue is for. beside: queues whose jobs wait for the same workers. ticket: what the
        attempt's outcome must carry.
        """
        what: list[str | float] = [job.id, job.attempt, 9 - priority, params, timeout_s]
        state, epoch, standing = self._run["put"](
            keys=[f"job:{job.id}", f"wait:{queue}", "seq", "epoch", "queues"],
            args=[*what, uuid.uuid4().hex, queue, model or "", ticket, *beside],
            client=self._client_for(params),
        )
        return Entered(state, epoch, Standing(*standing) if standing else None)

    def look(self, job_id: str) -> Record | None:
        """The record, or None where the store has none."""
        fields = self.store.hmget(f"job:{job_id}", "state", "attempt", "worker", "started", "outcome", "direct")
        return _record(cast(list[str | None], fields))

    def look_all(self, job_ids: Sequence[str]) -> dict[str, Record]:
        """The records there are, by job id, in one round trip."""
        pipe = self.store.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(f"job:{job_id}", "state", "attempt", "worker", "started", "outcome", "direct")
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
        envelope = _read(Envelope.decode, text)
        if envelope is None:
            return None
        started_at = int(started) / 1000 if started.isdecimal() else None
        return Record("ended", envelope.attempt, envelope.worker_id, started_at, envelope, said=text)

    def position(self, job_id: str, queue: str) -> int | None:
        """The job's place in its queue, 1 is next; None if it does not wait there."""
        rank = self.store.zrank(f"wait:{queue}", job_id)
        return None if rank is None else int(cast(int, rank)) + 1

    def standing(self, job_id: str, queue: str, beside: Sequence[str] = ()) -> Standing | None:
        """Where the job stands in its queue and against the queues beside it; None if it does not wait there."""
        found = self._run["stand"](keys=[f"wait:{queue}"], args=[job_id, *beside])
        return Standing(*found) if found else None

    def queues(self) -> dict[str, Queued]:
        """Every queue that jobs were ever entered for, by name."""
        models = cast(dict[str, str], self.store.hgetall("queues"))
        pipe = self.store.pipeline(transaction=False)
        for queue in models:
            pipe.zcard(f"wait:{queue}")
            pipe.zcard(f"begun:{queue}")
        counts = pipe.execute() if models else []
        return {
            queue: Queued(depth, model or None, running)
            for (queue, model), depth, running in zip(models.items(), counts[::2], counts[1::2], strict=True)
        }

    def ahead(self, priority: int) -> dict[str, int]:
        """How many jobs wait that would run before a new one of this priority, by queue."""
        queues = cast(list[str], self.store.hkeys("queues"))
        pipe = self.store.pipeline(transaction=False)
        for queue in queues:
            pipe.zcount(f"wait:{queue}", "-inf", _after(priority))
        return dict(zip(queues, pipe.execute() if queues else [], strict=True))

    def waiting(self, queue: str, priority: int) -> int:
        """How many jobs of the queue wait that would run before a new one of this priority."""
        return int(self.store.zcount(f"wait:{queue}", "-inf", _after(priority)))

    def progress(self, job_id: str) -> Progress | None:
        """How far a running job has come, as its worker last said."""
        said = cast(str | None, self.store.hget(f"job:{job_id}", "progress"))
        if not said:
            return None
        done, total, unit = said.split(" ", 2)
        return Progress(float(done), int(total) if total else None, unit)

    def hear(self, job_id: str, after: tuple[int, int], wait_s: float, count: int) -> list[tuple[str, dict[str, str]]]:
        """Id and fields of the next entries of a job's stream, waited for, at most WAIT_SLICE_S.

        after: the last one that was heard, as the two parts of its id; (0, 0) begins with the last run there is.
        """
        stream, start = f"events:{job_id}", f"{after[0]}-{after[1]}"
        if after == (0, 0) and (newest := cast(Any, self.store.xrevrange(stream, count=1))):
            # Before its first entry: a wake-up has the number 0.
            start = f"{int(newest[0][0].partition('-')[0]) - 1}-{2**64 - 1}"
        if wait_s and self._waiting is None:
            raise ValueError("This ledger was opened without a client for waiting.")
        client = self._waiting if wait_s and self._waiting else self.store
        block_ms = max(int(1000 * min(wait_s, WAIT_SLICE_S)), 1) if wait_s else None
        found = cast(Any, client.xread({stream: start}, count=count, block=block_ms))
        if not found:
            return []
        # By name with RESP3, in pairs with RESP2.
        ((_, entries),) = found.items() if isinstance(found, dict) else found
        return cast(list[tuple[str, dict[str, str]]], entries[0] if isinstance(found, dict) else entries)

    def traffic(self, queues: Iterable[str]) -> dict[str, Traffic]:
        """What waits and runs in these queues and in every other that jobs were ever entered for."""
        names = sorted({*queues, *cast(list[str], self.store.hkeys("queues"))})
        pipe = self.store.pipeline(transaction=False)
        pipe.time()
        for queue in names:
            pipe.zcard(f"wait:{queue}")
            pipe.zrange(f"begun:{queue}", 0, -1, withscores=True)
            pipe.hget(f"speed:{queue}", "mean_s")
        (seconds, microseconds), *found = pipe.execute()
        now = seconds + microseconds / 1e6
        return {
            queue: Traffic(depth, [max(now - at / 1000, 0.0) for _, at in begun], None if mean is None else float(mean))
            for queue, depth, begun, mean in zip(names, found[::3], found[1::3], found[2::3], strict=True)
        }

    def direct_secret(self) -> str:
        """What the region's tokens are signed with; made now if there is none. To change it, delete the key."""
        found = cast(str | None, self.store.get("direct:secret"))
        if found is None:
            self.store.set("direct:secret", secrets.token_hex(32), nx=True)
            found = str(self.store.get("direct:secret"))
        return found

    # The reconciler's side

    def epoch(self) -> str:
        """The store's present life; made now if it has none."""
        self.store.set("epoch", uuid.uuid4().hex, nx=True)
        return str(self.store.get("epoch"))

    def server(self) -> str:
        """The run of the server that answers: another one after a restart, or after a replica took over.

        Nothing of one that does not say.
        """
        try:
            return str(cast(dict[str, object], self.store.info("server")).get("run_id", ""))
        except redis.ResponseError:
            return ""

    def renew_epoch(self, led_until: float | None) -> bool:
        """Begin another life of the store if the database is an older copy of what led here; whether it is.

        led_until: what the database says, in unix seconds, of who led last.
        """
        known = cast(str | None, self.store.get("led"))
        if known is None or (led_until or 0.0) >= float(known):
            return False
        pipe = self.store.pipeline(transaction=True)
        pipe.set("epoch", uuid.uuid4().hex)
        pipe.delete("led")
        pipe.execute()
        return True

    def led(self, until: float) -> None:
        """Remember until when the database says that control leads."""
        self.store.set("led", repr(until))

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
            pipe.hdel(f"job:{job_id}", "outcome", "params", "direct")
            pipe.expire(f"job:{job_id}", TOMBSTONE_TTL_S)
            pipe.expire(f"celery-task-meta-{job_id}", TOMBSTONE_TTL_S)
            pipe.expire(f"events:{job_id}", ENDED_EVENTS_TTL_S)
        pipe.execute()

    def refuse(self, job_id: str, said: str, *, queue: str, worker_id: str | None = None) -> bool:
        """Drop an outcome that no worker of ours wrote, as Record.said has it, and count it.

        queue, worker_id: where the row says that the job waits or runs. True if the record held it and is gone: then
        the job has to be entered again. Otherwise only a waiter was told of it.
        """
        places = [f"wait:{queue}", f"begun:{queue}", f"running:{worker_id or ''}"]
        keys = [f"job:{job_id}", f"done:{job_id}", f"celery-task-meta-{job_id}", *places]
        return bool(self._run["refuse"](keys=keys, args=[job_id, said]))

    def forged(self) -> int:
        """How many outcomes were refused in this life of the store."""
        return int(cast(str | None, self.store.get("forged")) or 0)

    def discarded(self) -> int:
        """How many outcomes came too late for their attempt in this life of the store."""
        return int(cast(str | None, self.store.get("discarded")) or 0)

    def note_trace(self, job_id: str, traceparent: str) -> None:
        """Note the span that sends the job, for whoever sends it again or folds it; the first one stands."""
        self.store.set(f"trace:{job_id}", traceparent, nx=True, ex=TRACE_TTL_S)

    def trace(self, job_id: str) -> str:
        """The span that sent the job first; empty where none was noted."""
        return cast(str | None, self.store.get(f"trace:{job_id}")) or ""

    def orphans(self) -> list[tuple[str, str]]:
        """(worker id, job id) of every job whose worker's lease has ended; a worker that was lost is counted once.

        Nobody begins these attempts any more; each job needs its next one, or its end.
        """
        found = self._run["orphans"](
            keys=["workers", "ended", "cards", "lost", "names"],
            args=[int(LEASE_S), LOST_TTL_S, reliability.LOST_FAULTS, reliability.HALF_LIFE_S],
        )
        return list(zip(found[::2], found[1::2], strict=True))

    def bury(self, worker_id: str, job_id: str) -> None:
        """The job is no longer the dead worker's; its row has been dealt with."""
        self._run["bury"](keys=[f"job:{job_id}", f"running:{worker_id}"], args=[job_id, worker_id])

    def withdraw(self, moved: Iterable[tuple[str, int]]) -> None:
        """Drop what these jobs left behind, given as (id, present attempt); whoever waits for them is woken.

        An attempt that has an outcome keeps it, and the present attempt is left alone.
        """
        if words := [word for pair in moved for word in pair]:
            self._run["withdraw"](keys=[], args=[TOMBSTONE_TTL_S, *words])

    def entered(self) -> Iterator[list[str]]:
        """Ids of all jobs that wait or run here, some at a time; one that changes meanwhile may be missed."""
        for queue in cast(list[str], self.store.hkeys("queues")):
            for place in (f"wait:{queue}", f"begun:{queue}"):
                cursor = None
                while cursor != 0:
                    cursor, found = cast(
                        tuple[int, list[tuple[str, float]]], self.store.zscan(place, cursor or 0, count=1000)
                    )
                    yield [job_id for job_id, _ in found]

    def drop_places(self, job_ids: Iterable[str]) -> None:
        """Take jobs that have no record any more out of every queue's indexes."""
        gone = list(job_ids)
        pipe = self.store.pipeline(transaction=False)
        if gone:
            for queue in cast(list[str], self.store.hkeys("queues")):
                pipe.zrem(f"wait:{queue}", *gone)
                pipe.zrem(f"begun:{queue}", *gone)
        pipe.execute()

    # The worker's side

    def begin(self, job: Job, *, worker_id: str, token: str) -> Claim:
        """Ask for the attempt. The same token gets the same answer, so a lost answer can be asked for again."""
        answer, *rest = self._run["begin"](
            keys=[f"job:{job.id}", "seq", "news"], args=[job.id, job.attempt, worker_id, token, MAX_ATTEMPTS]
        )
        if answer != Answer.RUN:
            return Claim(Answer(answer), {}, 0.0)
        return Claim(Answer.RUN, json.loads(rest[0]), float(rest[1]), *rest[2:])

    def enter(self, job_id: str, direct: DirectJob, *, worker_id: str) -> float | None:
        """Enter a job that its client brought to the worker, as begun: when, in unix seconds; None if the id is used.

        It has no place in any queue, and its params stay with the worker: nobody else will run it.
        """
        started = self._run["enter"](
            keys=[
                f"job:{job_id}",
                "seq",
                "news",
                f"running:{worker_id}",
                f"begun:{routing.queue_name(direct.region, direct.type)}",
            ],
            args=[job_id, worker_id, direct.timeout_seconds, direct.encode()],
        )
        return started / 1000 if started else None

    def finish(
        self,
        envelope: Envelope,
        *,
        queue: str,
        name: str = "",
        model_queue: str | None = None,
        said: Sequence[tuple[int, str]] = (),
    ) -> bool:
        """Hand in an outcome, and wake everyone who waits for it; False if the attempt is no longer ours.

        name: the worker's, for which the outcome counts; without it it counts for nobody.
        said: number and JSON text of what the run said and the store has not got.
        queue: the type's, and model_queue the one of the jobs that name the model that ran: whose mean it enters.
        """
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
                    f"reliability:{name}",
                    *([f"speed:{model_queue}"] if model_queue else []),
                ],
                args=[
                    envelope.job_id,
                    envelope.attempt,
                    envelope.worker_id,
                    text,
                    _celery_result(envelope),
                    OUTCOME_TTL_S,
                    ran,
                    *(reliability.weigh(envelope) if name else (0, 0)),
                    reliability.HALF_LIFE_S,
                    MOST_ENTRIES,
                    ENDED_EVENTS_TTL_S,
                    *(word for entry in said for word in entry),
                ],
            )
        )

    def release(self, job: Job, *, worker_id: str) -> bool:
        """Give the attempt back, uncounted; the reconciler sends it to another worker."""
        keys = [f"job:{job.id}", "seq", "news", f"running:{worker_id}"]
        return bool(self._run["release"](keys=keys, args=[job.id, job.attempt, worker_id]))

    def tell(self, worker_id: str, said: Sequence[Said]) -> None:
        """Show what jobs say that the worker holds; of those that it does not, nothing."""
        words: list[str | int] = []
        for each in said:
            words += [each.job_id, each.attempt, _progress_text(each.progress), each.number, each.entry]
        self._run["tell"](keys=[], args=[worker_id, MOST_ENTRIES, EVENTS_TTL_S, *words])

    def _client_for(self, text: str) -> redis.Redis:
        if len(text) <= BULK_CHARS or self._bulk is self.store:
            return self.store
        # A dead server is found out by the client that does not wait for it.
        self.store.ping()
        return self._bulk


def _after(priority: int) -> str:
    """The score after every job of this priority."""
    # put.lua: the rank times 2^48, plus the order of arrival.
    return f"({(10 - priority) * 2**48}"


def _record(fields: list[str | None]) -> Record | None:
    state, attempt, worker, started, outcome, direct = fields
    if state is None:
        return None
    return Record(
        state=state,
        attempt=int(attempt or 0),
        worker_id=worker,
        started_at=int(started) / 1000 if started else None,
        outcome=_read(Envelope.decode, outcome),
        direct=_read(DirectJob.decode, direct),
        said=outcome or "",
    )


def _progress_text(progress: Progress | None) -> str:
    if progress is None:
        return ""
    return f"{progress.done} {'' if progress.total is None else progress.total} {progress.unit}"


def _read(decode: Callable[[str], T], text: str | None) -> T | None:
    """None for what no worker of ours wrote: one such record must not hold up all the others."""
    try:
        return decode(text) if text else None
    except (ValueError, TypeError, KeyError) as error:
        logger.error("a record in the store cannot be read and is ignored: %s", type(error).__name__)
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
