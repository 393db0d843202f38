"""Each job that ended counts once, for its owner's usage and quotas; GET /api/v1/usage shows it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Thread

import pytest
from flask import Flask
from sqlalchemy import Connection, text

from app.ends import Ends
from app.keys import Keys, Quotas, Scope
from app.usage import Usage
from tasks.job import JobError, JobState
from tests.app.conftest import CHAT, HandWorker

JOBS, USAGE = "/api/v1/jobs", "/api/v1/usage"


@pytest.fixture
def count(app: Flask) -> Callable[[], int]:
    """Counts what has ended, as control does; how many jobs that were."""
    return Ends(app.extensions["dispatch"].rows, [app.extensions["usage"].count]).hand_on


@pytest.fixture
def key(app: Flask) -> Callable[..., dict[str, str]]:
    """Makes keys; quotas as keyword arguments."""
    keys: Keys = app.extensions["keys"]
    return lambda *scopes, **quotas: {
        "X-API-Key": keys.create("test", scopes or [Scope.INFER], quotas=Quotas(**quotas))
    }


def do(app: Flask, worker: HandWorker, headers: dict[str, str], outcome: JobState = JobState.COMPLETED) -> str:
    """A job that a worker ran, folded; its id."""
    client = app.test_client()
    job_id: str = client.post(JOBS, json=CHAT, headers=headers).json["job_id"]
    worker.begin(job_id)
    worker.finish(job_id, outcome, None if outcome is JobState.COMPLETED else JobError("bad", "no"))
    client.get(f"{JOBS}/{job_id}", headers=headers)
    return job_id


def test_a_job_counts_once_with_what_its_worker_said_whoever_counts_and_how_often(app, worker, key, count):
    mine = key()
    do(app, worker, mine)
    do(app, worker, mine, JobState.FAILED)
    together = [Thread(target=count) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert count() == 0

    report = app.test_client().get(f"{USAGE}?group_by=day,model,type", headers=mine).json
    completed, failed = sorted(report["items"], key=lambda item: -item["completed"])
    assert (completed["model"], completed["type"], completed["day"]) == ("echo", "llm", str(datetime.now(UTC).date()))
    assert (completed["prompt_tokens"], completed["completion_tokens"], completed["gpu_seconds"]) == (10, 15, 0.5)
    assert (failed["model"], failed["failed"], failed["gpu_seconds"]) == (None, 1, 0.5)
    assert (report["total"]["jobs"], report["total"]["gpu_seconds"]) == (2, 1.0)


def test_a_count_that_breaks_off_leaves_the_job_to_be_counted_later(app, worker, key, count):
    mine = key()
    do(app, worker, mine)
    rows, usage = app.extensions["dispatch"].rows, app.extensions["usage"]

    def dies(connection: Connection, ended: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ends(rows, [usage.count, dies]).hand_on()
    assert app.test_client().get(USAGE, headers=mine).json["total"]["jobs"] == 0

    assert count() == 1
    assert app.test_client().get(USAGE, headers=mine).json["total"]["jobs"] == 1


def test_a_job_that_was_cancelled_while_it_ran_counts_the_time_that_it_held_its_gpu(app, worker, key, count):
    mine, client = key(), app.test_client()
    running, queued = (client.post(JOBS, json=CHAT, headers=mine).json["job_id"] for _ in range(2))
    worker.begin(running)
    client.get(f"{JOBS}/{running}", headers=mine)
    with app.extensions["database"].connect() as connection:
        connection.execute(text("UPDATE jobs SET started_at = started_at - 7 WHERE status = 'running'"))
    for job_id in (running, queued):
        client.delete(f"{JOBS}/{job_id}", headers=mine)
    count()

    total = client.get(USAGE, headers=mine).json["total"]
    assert total["cancelled"] == 2
    assert 7 <= total["gpu_seconds"] < 12


def test_usage_outlives_the_rows_and_goes_after_its_own_time(app, worker, key, count):
    mine, usage = key(), app.extensions["usage"]
    job_id = do(app, worker, mine)
    rows = app.extensions["dispatch"].rows
    assert rows.remains.outdated(-1, 10) == []  # Not counted yet, it may not go.
    count()
    assert [traces.job_id for traces in rows.remains.outdated(-1, 10)] == [job_id]
    rows.remains.delete([job_id])

    assert app.test_client().get(USAGE, headers=mine).json["total"]["jobs"] == 1
    assert usage.prune(400) == 0
    with app.extensions["database"].connect() as connection:
        connection.execute(text("UPDATE usage SET day = day - 401"))
    assert usage.prune(400) == 1


def test_a_client_sees_its_own_usage_and_an_admin_everybodys_or_one_keys(app, worker, key, count):
    mine, other, admin = key(), key(), key(Scope.ADMIN)
    do(app, worker, mine)
    do(app, worker, other)
    count()
    client, my_id = app.test_client(), mine["X-API-Key"][4:12]

    assert client.get(USAGE, headers=other).json["total"]["jobs"] == 1
    assert client.get(f"{USAGE}?key={my_id}", headers=other).status_code == 403
    by_key = client.get(f"{USAGE}?group_by=key", headers=admin).json
    assert by_key["total"]["jobs"] == 2
    assert my_id in [item["key"] for item in by_key["items"]]
    assert client.get(f"{USAGE}?key={my_id}", headers=admin).json["total"]["jobs"] == 1
    assert client.get(f"{USAGE}?key=deadbeef", headers=admin).status_code == 422


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=2020-01-01&to=2026-02-01", "from"),
        ("from=yesterday", "from"),
        ("group_by=day,owner", "group_by"),
        ("group_by=", "group_by"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_by_name(client, query, field):
    answer = client.get(f"{USAGE}?{query}")

    assert answer.status_code == 422
    assert list(answer.json["errors"]) == [field]


def test_no_more_jobs_are_taken_than_a_day_has_and_the_refusal_says_when_to_come_again(app, worker, key, count):
    mine, client = key(jobs_per_day=2, jobs_per_month=50), app.test_client()
    do(app, worker, mine)
    count()
    assert client.post(JOBS, json=CHAT, headers=mine).status_code == 202

    refused = [client.post(path, json=CHAT, headers=mine) for path in (JOBS, f"{JOBS}/sync")]
    refused.append(client.get(f"{JOBS}/direct/nearest?job_type=llm", headers=mine))

    assert [(answer.status_code, answer.json["code"]) for answer in refused] == [(429, "insufficient_quota")] * 3
    quota = refused[0].json["quota"]
    assert (quota["name"], quota["limit"], quota["used"]) == ("jobs_per_day", 2, 2)
    resets_at = datetime.fromisoformat(quota["resets_at"]).timestamp()
    assert resets_at % 86_400 == 0
    assert abs(int(refused[0].headers["Retry-After"]) - (resets_at - time.time())) < 10
    names = [quota["name"] for quota in client.get(USAGE, headers=mine).json["quotas"]]
    assert names == ["jobs_per_day", "jobs_per_month"]
    assert client.post(JOBS, json=CHAT, headers=key()).status_code == 202


@pytest.mark.parametrize("quota", ["tokens_per_day", "gpu_seconds_per_month"])
def test_tokens_and_gpu_seconds_that_are_used_up_close_the_door_and_a_change_opens_it(app, worker, key, count, quota):
    mine = key(**{quota: 1})
    for _ in range(2):
        do(app, worker, mine)
    usage: Usage = app.extensions["usage"]
    count()
    owner = mine["X-API-Key"][4:12]
    assert usage.spent(owner, 10).used[quota] >= 1
    app.extensions["quotas"]._known.clear()

    refused = app.test_client().post(JOBS, json=CHAT, headers=mine)
    assert refused.json["quota"]["name"] == quota
    app.extensions["keys"].change(owner, quotas={quota: None})
    assert app.test_client().post(JOBS, json=CHAT, headers=mine).status_code == 202
