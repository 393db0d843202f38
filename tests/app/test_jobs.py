"""The jobs resource, as the seed and section 8 of the design state it."""

import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.settings import Settings
from engines.catalogue import JobType
from tasks.job import JobError, JobState
from tests.rig import BUSY_S

MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
JOBS = "/api/v1/jobs"
#: The seed's fields of a job, which are always present.
SEED_FIELDS = {"job_id", "status", "result", "region", "worker_id", "created_at", "started_at", "completed_at"}


@pytest.fixture
def chat() -> dict:
    return {"type": "llm", "params": {"messages": [{"role": "user", "content": "你好"}]}}


@pytest.fixture
def job_id(client: FlaskClient, chat: dict) -> str:
    """A job that waits."""
    return client.post(JOBS, json=chat).json["job_id"]


# Create


def test_a_created_job_is_shown_with_exactly_the_seeds_fields(client, chat):
    answer = client.post(JOBS, json=chat)

    assert answer.status_code == 202
    assert set(answer.json) == {"job_id", "status", "created_at", "queue_position", "estimated_wait_seconds"}
    assert uuid.UUID(answer.json["job_id"])
    assert answer.json["status"] == "queued"
    assert MOMENT.fullmatch(answer.json["created_at"])
    assert answer.json["queue_position"] == 1
    assert answer.headers["Location"] == f"{JOBS}/{answer.json['job_id']}"
    assert client.get(answer.headers["Location"]).json["job_id"] == answer.json["job_id"]


def test_positions_count_from_one_in_order_of_priority(client, chat):
    first = client.post(JOBS, json=chat).json
    second = client.post(JOBS, json=chat).json
    urgent = client.post(JOBS, json={**chat, "priority": 9}).json

    assert (first["queue_position"], second["queue_position"], urgent["queue_position"]) == (1, 2, 1)
    assert client.get(f"{JOBS}/{second['job_id']}").json["queue_position"] == 3


def test_the_worker_gets_validated_params_with_their_defaults(client, worker, job_id):
    params = worker.begin(job_id)

    assert params["messages"] == [{"role": "user", "content": "你好"}]
    assert (params["max_tokens"], params["temperature"], params["top_p"]) == (2048, 0.7, 0.9)


def test_a_job_with_a_region_joins_its_queue(client, chat, worker):
    answer = client.post(JOBS, json={**chat, "region": "europe-west", "allow_cross_region": False})

    assert client.get(answer.headers["Location"]).json["region"] == "europe-west"
    assert worker.store.zrange("wait:europe-west.llm", 0, -1) == [answer.json["job_id"]]


# Idempotency


def test_the_same_key_and_body_give_the_same_job(client, chat, worker):
    headers = {"Idempotency-Key": "one"}
    first = client.post(JOBS, json=chat, headers=headers)
    again = client.post(JOBS, json=chat, headers=headers)

    assert again.status_code == 202
    assert again.json["job_id"] == first.json["job_id"]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert worker.waiting() == [first.json["job_id"]]


def test_defaults_written_out_are_the_same_body(client, chat):
    headers = {"Idempotency-Key": "one"}
    first = client.post(JOBS, json=chat, headers=headers)
    again = client.post(JOBS, json={**chat, "priority": 0, "timeout_seconds": 300}, headers=headers)

    assert again.json["job_id"] == first.json["job_id"]


def test_the_same_key_with_another_body_is_refused(client, chat):
    headers = {"Idempotency-Key": "one"}
    client.post(JOBS, json=chat, headers=headers)
    answer = client.post(JOBS, json={**chat, "priority": 5}, headers=headers)

    assert answer.status_code == 422
    assert answer.json["code"] == "idempotency_key_reused"


def test_keys_of_two_clients_do_not_meet(client, chat, make_key):
    mine, theirs = make_key("infer"), make_key("infer")
    first = client.post(JOBS, json=chat, headers={"Idempotency-Key": "one", **mine})
    second = client.post(JOBS, json=chat, headers={"Idempotency-Key": "one", **theirs})

    assert first.json["job_id"] != second.json["job_id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "schlüssel"])
def test_an_idempotency_key_that_is_none_is_refused_by_name(client, chat, key):
    answer = client.post(JOBS, json=chat, headers={"Idempotency-Key": key})

    assert answer.status_code == 422
    assert list(answer.json["errors"]) == ["Idempotency-Key"]


# Sync


def test_a_sync_job_answers_with_exactly_the_seeds_fields_and_ours(client, chat, worker):
    worker.show()
    thread = worker.answer_next()
    answer = client.post(f"{JOBS}/sync?timeout=10&wait_for_worker=true", json=chat)
    thread.join()

    assert answer.status_code == 200
    job = answer.json
    assert set(job) >= SEED_FIELDS
    assert (job["status"], job["region"], job["worker_id"]) == ("completed", "asia-east", worker.id)
    assert job["result"]["response"] == "你好！有什么我可以帮助你的吗？"
    assert job["result"]["usage"] == {"prompt_tokens": 10, "completion_tokens": 15, "total_tokens": 25}
    assert all(MOMENT.fullmatch(job[name]) for name in ("created_at", "started_at", "completed_at"))
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    assert answer.headers["X-Job-Id"] == job["job_id"]
    assert "detail" not in job
    assert client.get(f"{JOBS}/{job['job_id']}").json == job


def test_a_sync_job_sent_again_gives_the_same_result_at_once(client, chat, worker):
    headers = {"Idempotency-Key": "one"}
    thread = worker.answer_next()
    first = client.post(f"{JOBS}/sync?timeout=10", json=chat, headers=headers)
    thread.join()
    again = client.post(f"{JOBS}/sync?timeout=10", json=chat, headers=headers)

    assert again.status_code == 200
    assert again.json == first.json
    assert again.headers["Idempotent-Replayed"] == "true"


def test_a_sync_job_that_fails_answers_500_with_the_job(client, chat, worker):
    thread = worker.answer_next(JobState.FAILED, JobError("out_of_memory", "It needs 40 GiB; there are 8."))
    answer = client.post(f"{JOBS}/sync?timeout=10", json=chat)
    thread.join()

    assert answer.status_code == 500
    assert answer.json["status"] == "failed"
    assert answer.json["error"] == {"code": "out_of_memory", "message": "It needs 40 GiB; there are 8."}
    assert answer.json["detail"] == "It needs 40 GiB; there are 8."
    assert answer.headers["x-should-retry"] == "false"


def test_a_sync_job_that_is_cancelled_answers_409_with_the_job(client, app, chat, worker):
    def cancel() -> None:
        app.test_client().delete(f"{JOBS}/{worker.next_job()}")

    thread = threading.Thread(target=cancel)
    thread.start()
    answer = client.post(f"{JOBS}/sync?timeout=10", json=chat)
    thread.join()

    assert (answer.status_code, answer.json["status"]) == (409, "cancelled")
    assert answer.json["result"] is None


def test_a_sync_job_that_times_out_answers_504_with_the_job(client, chat, worker):
    thread = worker.answer_next(JobState.TIMEOUT, JobError("run_timeout", "It ran longer than 300 s."))
    answer = client.post(f"{JOBS}/sync?timeout=10", json=chat)
    thread.join()

    assert (answer.status_code, answer.json["status"]) == (504, "timeout")
    assert answer.json["error"]["code"] == "run_timeout"


def test_a_sync_job_still_running_at_its_timeout_goes_on_and_says_so(client, chat, worker):
    thread = threading.Thread(target=lambda: worker.begin(worker.next_job()))
    thread.start()
    answer = client.post(f"{JOBS}/sync?timeout=1", json=chat)
    thread.join()

    assert (answer.status_code, answer.json["status"]) == (504, "running")
    assert "goes on" in answer.json["detail"]
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["X-Job-Id"] == answer.json["job_id"]
    assert worker.finish(answer.json["job_id"])
    assert client.get(f"{JOBS}/{answer.json['job_id']}").json["status"] == "completed"


def test_a_sync_job_that_nobody_began_times_out_and_says_so(client, chat):
    answer = client.post(f"{JOBS}/sync?timeout=0.3", json=chat)

    assert (answer.status_code, answer.json["status"]) == (504, "timeout")
    assert answer.json["error"]["code"] == "queue_timeout"
    assert "No worker began it" in answer.json["detail"]
    assert client.get("/api/v1/jobs/stats/queue").json["total_queued"] == 0


def test_without_a_live_worker_and_without_waiting_a_sync_job_is_refused_at_once(client, chat):
    began = time.monotonic()
    answer = client.post(f"{JOBS}/sync?wait_for_worker=false", json=chat)

    assert time.monotonic() - began < 5
    assert (answer.status_code, answer.json["code"]) == (503, "no_worker")
    assert int(answer.headers["Retry-After"]) > 0
    assert client.get(JOBS).json["items"] == []


def test_with_a_live_worker_a_sync_job_needs_no_waiting_for_one(client, chat, worker):
    worker.show()
    thread = worker.answer_next()
    answer = client.post(f"{JOBS}/sync?timeout=10&wait_for_worker=false", json=chat)
    thread.join()

    assert answer.status_code == 200


@pytest.mark.parametrize("timeout", ["0", "-1", "3601", "nan", "inf", "soon", ""])
def test_a_sync_timeout_out_of_bounds_is_refused_by_name(client, chat, timeout):
    answer = client.post(f"{JOBS}/sync?timeout={timeout}", json=chat)

    assert (answer.status_code, list(answer.json["errors"])) == (422, ["timeout"])


def test_more_sync_waiters_than_threads_for_them_are_sent_away(make_app, settings: Settings, chat):
    app = make_app(replace(settings, threads=4))
    held = [threading.Thread(target=_wait_in_vain, args=(app, chat)) for _ in range(settings.threads // 4)]
    for thread in held:
        thread.start()
    _until(lambda: len(app.test_client().get(JOBS).json["items"]) == 2)

    answer = app.test_client().post(f"{JOBS}/sync?timeout=1", json=chat)

    assert (answer.status_code, answer.json["code"]) == (503, "too_many_waiting")
    assert int(answer.headers["Retry-After"]) > 0
    for thread in held:
        thread.join()
    assert app.test_client().post(f"{JOBS}/sync?timeout=0.1", json=chat).status_code == 504


# Read and cancel


def test_a_waiting_job_says_why_it_waits_and_has_every_field(client, job_id):
    job = client.get(f"{JOBS}/{job_id}").json

    assert set(job) >= SEED_FIELDS
    assert (job["status"], job["result"], job["worker_id"], job["error"]) == ("queued", None, None, None)
    assert "No live worker" in job["queued_reason"]
    assert job["estimated_wait_seconds"] is None


@pytest.mark.parametrize(
    "job_id", ["0e8f4c3a-5a1c-4f0e-9a52-0c3d5e7f9b11", "not-a-uuid", "1", "%00", "x" * 3000, "{brace}", "sync"]
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_id_that_is_unknown_or_no_uuid_is_not_found(client, method, job_id):
    answer = client.open(f"{JOBS}/{job_id}", method=method)

    assert (answer.status_code, answer.json["code"]) == (404, "job_not_found")


def test_an_id_in_capitals_is_the_same_id(client, job_id):
    assert client.get(f"{JOBS}/{job_id.upper()}").json["job_id"] == job_id


def test_another_clients_job_is_not_found(client, chat, make_key):
    mine, theirs = make_key("infer"), make_key("infer", "read")
    job_id = client.post(JOBS, json=chat, headers=mine).json["job_id"]

    for method in ("GET", "DELETE"):
        answer = client.open(f"{JOBS}/{job_id}", method=method, headers=theirs)
        assert (answer.status_code, answer.json["code"]) == (404, "job_not_found")
    assert client.get(JOBS, headers=theirs).json["items"] == []
    assert client.get(f"{JOBS}/{job_id}", headers=mine).json["status"] == "queued"


def test_an_admin_sees_and_cancels_everybodys_jobs(client, chat, make_key):
    job_id = client.post(JOBS, json=chat, headers=make_key("infer")).json["job_id"]
    admin = make_key("admin")

    assert client.get(f"{JOBS}/{job_id}", headers=admin).status_code == 200
    assert [job["job_id"] for job in client.get(JOBS, headers=admin).json["items"]] == [job_id]
    assert client.delete(f"{JOBS}/{job_id}", headers=admin).status_code == 200


def test_cancel_answers_with_exactly_the_seeds_fields_and_again_the_same(client, job_id, worker):
    for _ in range(2):
        answer = client.delete(f"{JOBS}/{job_id}")
        assert answer.status_code == 200
        assert answer.json == {"message": "Job cancelled", "job_id": job_id}
    assert client.get(f"{JOBS}/{job_id}").json["status"] == "cancelled"
    assert worker.waiting() == []


def test_cancel_after_completion_is_refused_with_the_status(client, job_id, worker):
    worker.begin(job_id)
    worker.finish(job_id)

    answer = client.delete(f"{JOBS}/{job_id}")

    assert answer.status_code == 409
    assert (answer.json["code"], answer.json["job_status"]) == ("job_ended", "completed")
    assert client.get(f"{JOBS}/{job_id}").json["status"] == "completed"


# List


def test_pages_hold_every_job_once_newest_first(client, chat):
    made = [client.post(JOBS, json=chat).json["job_id"] for _ in range(5)]

    seen, cursor = [], None
    while True:
        page = client.get(JOBS, query_string={"limit": 2, **({"cursor": cursor} if cursor else {})}).json
        assert set(page) == {"items", "next_cursor"}
        assert len(page["items"]) <= 2
        seen += [job["job_id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert seen == made[::-1]


def test_filters_narrow_the_list(client, chat):
    here = client.post(JOBS, json=chat).json["job_id"]
    there = client.post(JOBS, json={**chat, "region": "europe-west", "allow_cross_region": False}).json
    client.delete(f"{JOBS}/{here}")

    def ids(**query: str) -> list[str]:
        return [job["job_id"] for job in client.get(JOBS, query_string=query).json["items"]]

    assert ids(status="cancelled") == [here]
    assert ids(region="europe-west") == [there["job_id"]]
    assert ids(type="llm", status="queued") == [there["job_id"]]
    assert ids(type="whisper") == []
    assert ids(created_after="2020-01-01T00:00:00Z") == [there["job_id"], here]
    assert ids(created_after="2999-01-01T00:00:00+08:00") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("status=done", "status"),
        ("type=llmm", "type"),
        ("region=asia-eats", "region"),
        ("created_after=yesterday", "created_after"),
        ("cursor=x", "cursor"),
        ("cursor=WzEsICJcdTAwMDAiXQ==", "cursor"),
        ("cursor=bnVsbA==", "cursor"),
        ("state=queued", "state"),
        ("status=queued&status=failed", "status"),
    ],
)
def test_a_filter_that_cannot_be_is_refused_by_name(client, query, field):
    answer = client.get(f"{JOBS}?{query}")

    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])


def test_near_names_stand_in_the_refusal(client):
    assert "asia-east" in client.get(f"{JOBS}?region=asia-eats").json["detail"]
    assert "Near: status." in client.get(f"{JOBS}?statsu=queued").json["detail"]


# Statistics


def depths(**queued: int) -> dict[str, int]:
    """Every type's depth."""
    return {**dict.fromkeys(JobType, 0), **queued}


def test_statistics_have_the_seeds_fields(client, chat, worker):
    client.post(JOBS, json=chat)
    client.post(JOBS, json={**chat, "region": "europe-west", "allow_cross_region": False})
    worker.show()
    time.sleep(0.6)  # cards are read anew after half a second

    everywhere = client.get(f"{JOBS}/stats/queue").json
    here = client.get(f"{JOBS}/stats/queue?region=asia-east").json

    assert {"total_queued", "available_workers", "estimated_wait_seconds", "by_type"} < set(everywhere)
    assert (everywhere["total_queued"], everywhere["by_type"]) == (2, depths(llm=2))
    assert (here["total_queued"], here["available_workers"], here["by_type"]) == (1, 1, depths(llm=1))


# A region that is away


def test_with_the_store_down_an_asynchronous_job_is_held_and_a_sync_one_refused(client, chat, valkey):
    valkey.kill()

    began = time.monotonic()
    held = client.post(JOBS, json=chat)
    refused = client.post(f"{JOBS}/sync", json=chat)

    assert time.monotonic() - began < 4 + BUSY_S
    assert (held.status_code, held.json["queue_position"]) == (202, None)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    assert [job["job_id"] for job in client.get(JOBS).json["items"]] == [held.json["job_id"]]
    assert client.get(f"{JOBS}/stats/queue").status_code == 503


def test_with_the_database_away_the_answer_is_503(client, app: Flask, chat):
    with app.extensions["database"].connect() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")

    answer = client.post(JOBS, json=chat)

    assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
    assert int(answer.headers["Retry-After"]) > 0


def _wait_in_vain(app: Flask, chat: dict) -> None:
    app.test_client().post(f"{JOBS}/sync?timeout=2", json=chat)


def _until(holds: Callable[[], bool], timeout_s: float = 5) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.01)
