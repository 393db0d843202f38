"""What goes when its time has come: results, rows, blobs, and what the stores and brokers hold."""

import json
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, text

from app.blobs import FOLDERS, INLINE_CHARS, Blobs
from app.control import Reconciler, _too_old
from app.retention import BATCH, ORPHAN_S, STALE_MESSAGES, Retention
from app.rows import Rows
from app.settings import Settings
from app.tables import open_database
from app.usage import Usage
from engines.catalogue import JobType
from engines.contract import Progress
from tasks.job import DirectJob, Envelope, Job, JobError, JobState
from tasks.ledger import ENDED_EVENTS_TTL_S, TOMBSTONE_TTL_S, Ledger
from tasks.presence import ORDER_TTL_S
from tasks.records import Said
from tasks.settings import SettingsError
from tests.app.conftest import QUEUE, REGION, RESULT

JOBS = "/api/v1/jobs"
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
LONG = "x" * (INLINE_CHARS + 1)
LONG_CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": LONG}]}}
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
#: A script: everything that a key holds, as one text.
CONTENTS = """
local kind = redis.call('TYPE', KEYS[1]).ok
local commands = {string = {'GET'}, hash = {'HGETALL'}, set = {'SMEMBERS'}, list = {'LRANGE', 0, -1},
  zset = {'ZRANGE', 0, -1}, stream = {'XRANGE', '-', '+'}}
local command = commands[kind]
return cjson.encode(redis.call(command[1], KEYS[1], unpack(command, 2)))
"""


def age(database: Engine, seconds: float) -> None:
    """Make every job's times lie further back."""
    times = ", ".join(f"{name} = {name} - :s" for name in ("created_at", "started_at", "completed_at"))
    with database.connect() as connection:
        connection.execute(text(f"UPDATE jobs SET {times}, noted_at = completed_at - :s"), {"s": seconds})


def count(database: Engine, where: str = "1 = 1") -> int:
    with database.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM jobs WHERE {where}")).scalar_one())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def complete(worker: Any, job_id: str, response: str) -> dict[str, Any]:
    """Run the job to its end; its result."""
    worker.begin(job_id)
    result = {"response": response, "finish_reason": "stop", "model": "echo", "usage": {}}
    ticket = str(worker.store.hget(f"job:{job_id}", "ticket") or "")
    envelope = Envelope(job_id, 1, worker.id, "asia-east", JobState.COMPLETED, run_s=1, result=result)
    if hasattr(envelope, "ticket"):
        object.__setattr__(envelope, "ticket", ticket)
    assert worker.ledger.finish(envelope, queue="asia-east.llm")
    return result


@pytest.fixture
def retention_of() -> Callable[[Flask], Retention]:
    """The retention of an app's platform, with the default settings."""

    def make(app: Flask) -> Retention:
        dispatch, settings = app.extensions["dispatch"], app.extensions["settings"]
        blobs = Blobs(settings.blobs_url)
        return Retention(dispatch.rows, dispatch.links, blobs, result_hours=24, row_days=30)

    return make


def test_a_pruned_result_is_said_to_be_gone_and_the_job_stays(client, app, worker, settings, retention_of):
    headers = {"Idempotency-Key": "k"}
    job_id = client.post(JOBS, json=LONG_CHAT, headers=headers).json["job_id"]
    result = complete(worker, job_id, LONG)
    assert client.get(f"{JOBS}/{job_id}").json["result"] == result
    retention = retention_of(app)

    age(app.extensions["database"], DAY_S - 60)
    assert retention.prune() == 0
    age(app.extensions["database"], 120)
    assert (retention.prune(), retention.prune(), retention.delete()) == (1, 0, 0)

    answer = client.get(f"{JOBS}/{job_id}")
    assert (answer.status_code, answer.json["status"], answer.json["result"]) == (200, "completed", None)
    assert "no longer kept" in answer.json["warnings"][-1]
    assert answer.json["result_pruned_at"] is not None
    assert files(Path(settings.blobs_url)) == []
    again = client.post(JOBS, json=LONG_CHAT, headers=headers)
    assert (again.status_code, again.json["job_id"]) == (202, job_id)
    assert client.post(JOBS, json=CHAT, headers=headers).status_code == 422


def test_a_row_goes_with_its_key_and_what_is_live_stays_whatever_its_age(client, app, worker, settings, retention_of):
    ended = client.post(JOBS, json=LONG_CHAT, headers={"Idempotency-Key": "k"}).json["job_id"]
    complete(worker, ended, "short")
    client.get(f"{JOBS}/{ended}")
    live = client.post(JOBS, json=LONG_CHAT).json["job_id"]
    age(app.extensions["database"], 31 * DAY_S)
    retention = retention_of(app)

    # Not pruned before: its blobs go all the same.
    assert (retention.delete(), retention.delete(), retention.prune()) == (1, 0, 0)

    assert client.get(f"{JOBS}/{ended}").status_code == 404
    assert client.get(f"{JOBS}/{live}").json["status"] == "queued"
    assert len(files(Path(settings.blobs_url))) == 1
    assert client.post(JOBS, json=CHAT, headers={"Idempotency-Key": "k"}).json["job_id"] != ended


def test_a_request_that_retention_overtakes_is_no_failure(client, app, worker, retention_of):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    complete(worker, job_id, LONG)
    dispatch = app.extensions["dispatch"]
    row = dispatch.look(job_id)
    age(app.extensions["database"], 2 * DAY_S)

    retention_of(app).prune()

    assert row.result is not None
    assert dispatch.result(row) is None


def test_many_jobs_come_down_in_batches_while_others_are_written(any_database_url, tmp_path):
    database = open_database(any_database_url)
    rows = Rows(database)
    blobs = Blobs(str(tmp_path / "blobs"))
    held = [blobs.keep(LONG, str(uuid.UUID(int=number))) for number in range(20)]
    columns = "id, owner, type, params, priority, region, allow_cross_region, timeout_seconds, status, attempt, version"
    columns += ", created_at, completed_at, noted_at, sends, withdrawn, result"
    old = time.time() - 40 * DAY_S
    many = [
        {"id": str(uuid.UUID(int=number)), "at": old, "result": held[number] if number < len(held) else "{}"}
        for number in range(3 * BATCH + 7)
    ]
    values = ":id, 'ann', 'llm', '{}', 0, 'asia-east', true, 60, 'completed', 1, 2, :at, :at, :at, 1, false, :result"
    with database.connect().execution_options(isolation_level="SERIALIZABLE") as connection, connection.begin():
        connection.execute(text(f"INSERT INTO jobs ({columns}) VALUES ({values})"), many)
    retention = Retention(rows, {}, blobs, result_hours=24, row_days=30)

    with ThreadPoolExecutor(1) as pool:
        pruned = pool.submit(lambda: [retention.prune() for _ in range(5)])
        for number in range(20):
            made = rows.insert(
                str(uuid.uuid4()),
                **dict.fromkeys(("model", "requested_model", "region_wanted", "queue_timeout_seconds"), None),
                **dict.fromkeys(("idempotency_key", "fingerprint"), None),
                owner="ben",
                type=JobType.LLM,
                params="{}",
                priority=0,
                region="asia-east",
                allow_cross_region=True,
                timeout_seconds=60,
            )
            assert made[1], number
        assert pruned.result() == [BATCH, BATCH, BATCH, 7, 0]
    assert files(tmp_path / "blobs") == []
    assert count(database, "result IS NOT NULL") == 0
    assert count(database, "pruned_at IS NOT NULL") == len(many)

    deleted = [retention.delete() for _ in range(5)]

    assert deleted == [BATCH, BATCH, BATCH, 7, 0]
    assert count(database) == 20
    database.dispose()


def test_blobs_whose_row_never_came_go_after_a_day(client, app, settings, retention_of):
    folder = Path(settings.blobs_url)
    blobs, retention = Blobs(settings.blobs_url), retention_of(app)
    held = client.post(JOBS, json=LONG_CHAT).json["job_id"]
    orphan, second, young = blobs.keep(LONG, str(uuid.uuid4())), blobs.keep(LONG, held), ""
    for path in files(folder):
        os.utime(path, times=(time.time() - ORPHAN_S - 60,) * 2)
    young = blobs.keep(LONG, str(uuid.uuid4()))

    assert retention.sweep_blobs(FOLDERS, time.time()) == 2

    left = {f"blob:{path.name}" for path in files(folder)}
    assert left == {young, app.extensions["dispatch"].rows.get(held).params}
    assert not left & {orphan, second}


def test_each_folder_of_blobs_has_its_turn_within_a_day(client, app, retention_of, settings):
    blobs, retention = Blobs(settings.blobs_url), retention_of(app)
    for number in (0x00, 0x7F, 0xFF):
        blobs.keep(LONG, f"{number:02x}{str(uuid.uuid4())[2:]}")
    begin = time.time() + 2 * ORPHAN_S

    for minutes in range(0, 24 * 60, 5):
        retention.sweep_folder(begin + minutes * 60)

    assert files(Path(settings.blobs_url)) == []


class Lives:
    """Jobs that go every way that a job can go; what is left of them in the store is told by their ids."""

    def __init__(self, app: Flask, client: Any, worker: Any, reconciler: Reconciler) -> None:
        self.dispatch = app.extensions["dispatch"]
        self.client, self.worker, self.reconciler = client, worker, reconciler
        self.ledger: Ledger = worker.ledger
        self.ids: list[str] = []

    def submit(self, path: str = JOBS) -> str:
        self.ids.append(self.client.post(path, json=CHAT if path == JOBS else None).json["job_id"])
        return self.ids[-1]

    def begin(self, job_id: str, attempt: int = 1, worker_id: str = "") -> Envelope:
        """Begin the attempt and say something; its outcome, not handed in yet."""
        held_by = worker_id or self.worker.id
        claim = self.ledger.begin(Job(job_id, JobType.LLM, attempt), worker_id=held_by, token=job_id)
        self.ledger.tell(held_by, [Said(job_id, attempt, Progress(1, 2, "token"), 1, '["hi"]')])
        return Envelope(job_id, attempt, held_by, REGION, JobState.COMPLETED, 1.0, RESULT, ticket=claim.ticket)

    def finish(self, envelope: Envelope) -> bool:
        return self.ledger.finish(envelope, queue=QUEUE, said=[(2, '["!"]')])

    def cancel(self, job_id: str) -> None:
        assert self.client.delete(f"{JOBS}/{job_id}").status_code == 200

    def completed(self) -> None:
        self.finish(self.begin(self.submit()))

    def cancelled_while_it_waits(self) -> None:
        self.cancel(self.submit())

    def cancelled_while_it_runs(self) -> None:
        outcome = self.begin(job_id := self.submit())
        self.cancel(job_id)
        self.finish(replace(outcome, outcome=JobState.CANCELLED, result=None))

    def failed_and_retried(self) -> None:
        outcome = self.begin(job_id := self.submit())
        self.finish(replace(outcome, outcome=JobState.FAILED, result=None, error=JobError("engine_error", "no")))
        assert self.client.get(f"{JOBS}/{job_id}").json["status"] == "failed"
        self.finish(self.begin(self.submit(f"{JOBS}/{job_id}/retry")))

    def lost_and_run_by_another(self) -> None:
        late = self.begin(job_id := self.submit(), worker_id="lost")
        self.ledger.presence.retire("lost", told=False)
        self.reconciler.tick()
        outcome = self.begin(job_id, attempt=2)
        assert (self.finish(late), self.finish(outcome)) == (False, True)

    def given_back(self) -> None:
        self.begin(job_id := self.submit())
        assert self.ledger.release(Job(job_id, JobType.LLM, 1), worker_id=self.worker.id)
        self.finish(self.begin(job_id))

    def lost_too_often(self) -> None:
        self.worker.store.hset(f"job:{self.submit()}", "deliveries", 9)
        assert self.ledger.begin(Job(self.ids[-1], JobType.LLM, 1), worker_id="w", token="t").answer == "POISON"

    def moved_while_it_runs(self) -> None:
        late = self.begin(job_id := self.submit())
        assert self.client.get(f"{JOBS}/{job_id}").json["status"] == "running"
        assert self.dispatch.rows.move(REGION, JobType.LLM, None, to="europe-west", running=True, limit=1)
        self.ledger.withdraw([(job_id, 2)])
        assert not self.finish(late)
        self.cancel(job_id)

    def brought(self) -> None:
        self.ids.append(job_id := str(uuid.uuid4()))
        ticket = self.dispatch.tickets.sign(job_id, 1, REGION)
        direct = DirectJob("ann", JobType.LLM, None, None, 3, REGION, REGION, True, 30.0, ticket)
        assert self.ledger.enter(job_id, direct, worker_id=self.worker.id)
        self.finish(Envelope(job_id, 1, self.worker.id, REGION, JobState.COMPLETED, 1.0, RESULT, ticket=ticket))

    def traced(self) -> None:
        job_id = self.submit()
        self.ledger.note_trace(job_id, "00-1-2-01")
        self.finish(self.begin(job_id))


def test_the_store_comes_back_down_after_many_jobs(client, app, worker):
    store, reconciler = worker.store, Reconciler(app.extensions["dispatch"])
    worker.show()
    before = len(store.keys("*"))
    lives = Lives(app, client, worker, reconciler)
    for _ in range(3):
        lives.completed()
        lives.cancelled_while_it_waits()
        lives.cancelled_while_it_runs()
        lives.failed_and_retried()
        lives.lost_and_run_by_another()
        lives.given_back()
        lives.lost_too_often()
        lives.moved_while_it_runs()
        lives.brought()
        lives.traced()

    reconciler.tick()

    assert count(app.extensions["database"], "status IN ('queued', 'running')") == 0
    assert count(app.extensions["database"]) == len(lives.ids)
    # Nothing waits, so whatever has no time to live would stay for ever.
    lasting = [key for key in store.scan_iter() if store.ttl(key) == -1]
    kept = b" ".join([" ".join(lasting).encode(), *(store.eval(CONTENTS, 1, key).encode() for key in lasting)])
    assert [job_id for job_id in lives.ids if job_id.encode() in kept] == []
    assert worker.id.encode() in kept
    # seq, epoch, queues, and the like: they do not grow with jobs.
    assert len(lasting) <= before + 6
    lives_s = {key: store.ttl(key) for key in store.scan_iter() if any(job_id in key for job_id in lives.ids)}
    assert {key[:-36] for key in lives_s} == {"job:", "done:", "events:", "celery-task-meta-", "trace:"}
    assert max(ttl for key, ttl in lives_s.items() if not key.startswith("trace:")) <= TOMBSTONE_TTL_S
    assert max(ttl for key, ttl in lives_s.items() if key.startswith("events:")) <= ENDED_EVENTS_TTL_S


def test_what_a_lost_worker_held_of_an_ended_job_goes(client, app, worker, valkey):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    worker.show()
    worker.begin(job_id)
    assert client.delete(f"{JOBS}/{job_id}").status_code == 200
    worker.store.delete(f"lease:{worker.id}")
    worker.ledger.presence.retire(worker.id, told=False)

    Reconciler(app.extensions["dispatch"]).tick()

    assert 0 < worker.store.ttl(f"job:{job_id}") <= 600
    assert not worker.store.hexists(f"job:{job_id}", "params")
    assert worker.store.zcard("begun:asia-east.llm") == 0


def test_what_the_store_holds_of_rows_that_are_gone_is_dropped(client, app, worker, retention_of):
    ids = [client.post(JOBS, json=CHAT).json["job_id"] for _ in range(4)]
    waits, runs, gone, live = ids
    worker.begin(runs)
    with app.extensions["database"].connect() as connection:
        connection.execute(text("DELETE FROM jobs WHERE id <> :id"), {"id": live})
    worker.store.delete(f"job:{gone}")

    retention_of(app).sweep_stores()

    assert worker.waiting() == [live]
    assert worker.store.hget(f"job:{runs}", "cancel") == "1"
    assert worker.ledger.begin(Job(waits, JobType.LLM, 1), worker_id="w", token="t").answer == "CANCELLED"
    assert worker.store.ttl(f"job:{live}") == -1


def test_an_order_to_drain_outlives_its_worker_by_a_while_only(app, worker, retention_of):
    worker.ledger.presence.order("gone", (), drain=True)
    worker.ledger.presence.order(worker.id, (), drain=True)
    for name in ("gone", worker.id):
        worker.store.hset("orders", name, int(time.time() - ORDER_TTL_S - 60))
    worker.show()
    # As an earlier version wrote it.
    worker.store.hset("orders", "older", "drain")

    retention_of(app).sweep_stores()

    assert worker.ledger.presence.orders() == {worker.id, "older"}
    assert worker.store.hget("orders", "older") != "drain"


def test_messages_of_ended_jobs_go_from_queues_that_nobody_serves(client, app, valkey, retention_of):
    broker = valkey.client(0)
    client.delete(f"{JOBS}/{client.post(JOBS, json=CHAT).json['job_id']}")
    queue = next(key for key in broker.keys("*") if broker.type(key) == "list")
    broker.rpush(queue, *([broker.lindex(queue, 0)] * STALE_MESSAGES))
    waits = client.post(JOBS, json={**CHAT, "region": "europe-west"}).json["job_id"]

    retention_of(app).purge_queues()

    assert broker.llen(queue) == 0
    left = [key for key in broker.keys("*") if broker.type(key) == "list"]
    assert [waits in json.dumps(broker.lrange(key, 0, -1)) for key in left] == [True]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RESULT_RETENTION_HOURS", "0", "from 1 to"),
        ("ROW_RETENTION_DAYS", "0", "from 1 to"),
        ("RESULT_RETENTION_HOURS", "721", "longer than ROW_RETENTION_DAYS=30"),
    ],
)
def test_a_time_that_would_break_a_promise_is_refused(name, value, said):
    with pytest.raises(SettingsError, match=said):
        Settings.from_environ({name: value})


def test_the_audit_log_is_pruned_in_batches_where_a_setting_says_so(app: Flask, client: Any):
    log = app.extensions["audit"]
    for _ in range(5):
        log.record("keys.create", "k", "ok", actor="cli:me", address=None)
    with app.extensions["database"].connect() as connection:
        connection.execute(text("UPDATE audit SET at = at - :s WHERE id <= 3"), {"s": 3 * DAY_S})

    counts = [log.prune(2, 2) for _ in range(3)]

    assert counts == [2, 1, 0]
    assert len(log.newest()) == 2
    environ = {"AUDIT_RETENTION_DAYS": "2"}
    assert "rows of the audit log" in _too_old(Usage(log._engine), log, Settings.from_environ(environ))
    assert "rows of the audit log" not in _too_old(Usage(log._engine), log, Settings.from_environ({}))
