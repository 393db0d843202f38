"""Webhooks from the end of a job to its receiver: signed, told once, tried again, logged, replayed, disabled."""

import ipaddress
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, text
from standardwebhooks import Webhook, WebhookVerificationError

from app.courier import Courier, Outcome, retry_after_s
from app.deliveries import Deliveries
from app.destinations import Destinations
from app.ends import Ends
from app.rows import Rows
from app.tables import open_database
from app.webhooks import MOST_WEBHOOKS
from engines.catalogue import JobType
from tasks.job import Envelope, JobError, JobState
from tests.app.conftest import CHAT, RESULT
from tests.app.receiver import Receiver, receiving
from tests.rig import ROOT, until

JOBS, HOOKS = "/api/v1/jobs", "/api/v1/webhooks"
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]
DAY_S = 86_400.0


@pytest.fixture
def app(make_app: Callable[..., Flask], settings: Any) -> Flask:
    """The API, of an operator who lets webhooks come to this machine."""
    return make_app(replace(settings, webhook_networks=LOOPBACK, webhook_http=True, public_url="https://gpu.example"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver."""
    with receiving() as found:
        yield found


class Post:
    """What the leading control process does for webhooks, step by step."""

    def __init__(self, app: Flask, **options: Any) -> None:
        self.deliveries: Deliveries = app.extensions["deliveries"]
        self.ends = Ends(app.extensions["dispatch"].rows, [self.deliveries.enter])
        self.courier = Courier(self.deliveries, app.extensions["destinations"], **{"log_days": 30, **options})

    def go(self) -> int:
        """Hand on what has ended and send what is due, to the end; how many attempts that were."""
        self.ends.hand_on()
        with ThreadPoolExecutor(4) as pool:
            return self.courier.send_due(pool)


@pytest.fixture
def post(app: Flask) -> Post:
    """The post."""
    return Post(app)


@pytest.fixture
def hook(client: FlaskClient, receiver: Receiver) -> dict[str, Any]:
    """A webhook at the receiver, as it is shown when it is made."""
    answer = client.post(HOOKS, json={"url": receiver.url})
    assert answer.status_code == 201, answer.json
    shown: dict[str, Any] = answer.json
    return shown


@pytest.fixture
def end_job(client: FlaskClient, worker: Any) -> Callable[..., str]:
    """Runs a job to its end; its id."""

    def end(outcome: JobState = JobState.COMPLETED, error: JobError | None = None) -> str:
        job_id: str = client.post(JOBS, json=CHAT).json["job_id"]
        worker.begin(job_id)
        worker.finish(job_id, outcome, error)
        assert client.get(f"{JOBS}/{job_id}").json["status"] == str(outcome)
        return job_id

    return end


def log(client: FlaskClient, hook: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.get(f"{HOOKS}/{hook['id']}/deliveries", query_string=query).json["items"]
    return items


def forward(app: Flask, seconds: float) -> None:
    """Make everything that is to come, and what has failed, lie further back."""
    database: Engine = app.extensions["database"]
    with database.connect() as connection:
        connection.execute(text("UPDATE webhook_deliveries SET next_at = next_at - :s"), {"s": seconds})
        connection.execute(text("UPDATE webhooks SET failing_since = failing_since - :s"), {"s": seconds})


def test_the_end_of_a_job_is_told_once_signed_and_without_its_result(client, receiver, hook, end_job, post):
    job_id = end_job()

    assert (post.go(), post.go()) == (1, 0)

    ((headers, body),) = receiver.got
    told = Webhook(hook["secret"]).verify(body, headers)
    assert told["type"] == "job.completed"
    assert told["timestamp"] == told["data"]["completed_at"]
    assert told["data"]["job_id"] == job_id
    assert told["data"]["url"] == f"https://gpu.example{JOBS}/{job_id}"
    assert (told["data"]["status"], told["data"]["type"], "result" in told["data"]) == ("completed", "llm", False)
    assert RESULT["response"] not in body.decode()
    assert headers["content-type"] == "application/json"
    (delivery,) = log(client, hook)
    assert (delivery["id"], delivery["state"], delivery["job_id"]) == (headers["webhook-id"], "delivered", job_id)
    assert [(one["status_code"], one["error"]) for one in delivery["attempts"]] == [(204, None)]
    assert delivery["next_attempt_at"] is None
    assert post.courier.outcomes == {Outcome.DELIVERED: 1}


def test_a_changed_body_and_another_secret_are_seen_by_the_receiver(receiver, hook, end_job, post):
    end_job()
    post.go()
    ((headers, body),) = receiver.got

    for secret, changed in ((hook["secret"], body + b" "), ("whsec_" + "A" * 43 + "=", body)):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(changed, headers)


def test_every_end_has_its_event_and_a_long_message_keeps_the_body_small(client, receiver, hook, end_job, post):
    end_job(JobState.FAILED, JobError("engine_failed", "好" * 50_000))
    end_job(JobState.TIMEOUT, JobError("run_timeout", "late"))
    client.delete(f"{JOBS}/{client.post(JOBS, json=CHAT).json['job_id']}")

    assert post.go() == 3

    told = [json.loads(body) for _, body in receiver.got]
    assert sorted(one["type"] for one in told) == ["job.cancelled", "job.failed", "job.timeout"]
    assert all(len(body) < 20_000 for _, body in receiver.got)


def test_an_account_that_fails_is_logged_without_the_words_of_what_it_choked_on(app, end_job, caplog):
    quoted = "the answer was: canary"

    def choke(*_: object) -> None:
        raise ValueError(quoted)

    leads, stopped = threading.Event(), threading.Event()
    leads.set()
    end_job()
    ends = Ends(app.extensions["dispatch"].rows, [choke])
    thread = threading.Thread(target=ends.run, args=(leads, stopped))
    thread.start()
    until(lambda: "could not be handed on" in caplog.text)
    stopped.set()
    thread.join()

    assert "ValueError" in caplog.text
    assert "canary" not in caplog.text


def test_a_webhook_hears_of_what_it_asked_for_alone_and_of_its_own_owners_jobs(
    app, client, receiver, end_job, make_key
):
    for wanted in ({"events": ["job.failed"]}, {"job_types": ["whisper"]}, {"enabled": False}):
        assert client.post(HOOKS, json={"url": receiver.url, **wanted}).status_code == 201
    end_job()
    client.post(HOOKS, json={"url": receiver.url}, headers=make_key("infer"))
    post = Post(app)

    assert post.go() == 0


def test_what_had_ended_before_there_was_a_webhook_is_not_told(client, receiver, end_job, post):
    end_job()
    post.ends.hand_on()
    client.post(HOOKS, json={"url": receiver.url})

    assert post.go() == 0


def test_a_failure_is_tried_again_by_the_schedule_until_it_ends(app, client, receiver, hook, end_job):
    receiver.statuses = [500, 302, 503]
    receiver.headers = {"Location": receiver.url}
    end_job()
    post = Post(app, schedule_s=(0, 5, 300))

    attempts = [post.go()]
    for early_s, rest_s in ((4, 3), (290, 80)):
        forward(app, early_s)
        attempts.append(post.go())
        forward(app, rest_s)
        attempts.append(post.go())
    forward(app, DAY_S)

    assert [*attempts, post.go()] == [1, 0, 1, 0, 1, 0]
    assert len(set(receiver.ids())) == 1
    (delivery,) = log(client, hook, state="failed")
    assert [one["status_code"] for one in delivery["attempts"]] == [500, 302, 503]
    assert "redirects are not followed" in delivery["attempts"][1]["error"]
    assert post.courier.outcomes == {Outcome.RETRIED: 2, Outcome.FAILED: 1}
    assert client.get(f"{HOOKS}/{hook['id']}").json["failing_since"] is not None
    end_job()
    post.go()
    assert client.get(f"{HOOKS}/{hook['id']}").json["failing_since"] is None


def test_retry_after_is_honoured(app, receiver, hook, end_job, post):
    receiver.statuses, receiver.headers = [429], {"Retry-After": "3600"}
    end_job()
    post.go()

    forward(app, 3500)
    assert post.go() == 0
    forward(app, 101)
    assert post.go() == 1


def test_retry_after_may_be_a_date_and_may_be_nonsense():
    at = 1_700_000_000.0

    assert retry_after_s(format_datetime(datetime.fromtimestamp(at + 90, UTC), usegmt=True), at) == 90
    assert [retry_after_s(value, at) for value in ("-1", "soon", "", "٣", "Thu, 01 Jan 1970 00:00:00 GMT")] == [0] * 5
    assert retry_after_s("9" * 400, at) < 1e9


def test_410_disables_and_what_was_pending_is_given_up(client, receiver, hook, end_job, post):
    receiver.statuses = [500, 410]
    end_job()
    post.go()
    end_job()
    post.go()

    shown = client.get(f"{HOOKS}/{hook['id']}").json
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "It answered 410 Gone.")
    assert {one["state"] for one in log(client, hook)} == {"failed"}
    end_job()
    assert post.go() == 0
    refused = client.post(f"{HOOKS}/{hook['id']}/test")
    assert (refused.status_code, refused.json["code"]) == (409, "webhook_disabled")


def test_long_failure_disables_says_why_and_a_change_enables_again(app, client, receiver, hook, end_job, post):
    receiver.statuses = [500, 500]
    end_job()
    post.go()
    assert client.get(f"{HOOKS}/{hook['id']}").json["enabled"]
    forward(app, 5 * DAY_S + 1)
    post.go()

    shown = client.get(f"{HOOKS}/{hook['id']}").json
    assert not shown["enabled"]
    assert shown["disabled_reason"].startswith("No delivery has arrived since ")
    assert shown["disabled_reason"].endswith("It answered 500.")

    shown = client.patch(f"{HOOKS}/{hook['id']}", json={"enabled": True}).json
    assert (shown["enabled"], shown["disabled_reason"], shown["failing_since"]) == (True, None, None)
    end_job()
    assert post.go() == 1


def test_a_delivery_is_replayed_under_its_own_id(client, receiver, hook, end_job, post):
    end_job()
    post.go()
    (delivery,) = log(client, hook)

    answer = client.post(f"{HOOKS}/{hook['id']}/deliveries/{delivery['id']}/replay")

    assert (answer.status_code, answer.json["state"]) == (202, "pending")
    assert post.go() == 1
    assert receiver.ids() == [delivery["id"]] * 2
    assert [one["status_code"] for one in log(client, hook)[0]["attempts"]] == [204, 204]


def test_both_secrets_sign_for_a_while(app, client, receiver, hook, end_job, post):
    answer = client.post(f"{HOOKS}/{hook['id']}/rotate-secret", json={"overlap_hours": 1})
    new = answer.json["secret"]
    assert answer.json["old_secret_until"] is not None
    end_job()
    post.go()
    later = Post(app, clock=lambda: time.time() + 3601)
    end_job()
    later.go()

    (headers, body), (late_headers, late_body) = receiver.got
    for secret in (hook["secret"], new):
        assert Webhook(secret).verify(body, headers)
    assert late_headers["webhook-signature"].count("v1,") == 1
    assert client.get(f"{HOOKS}/{hook['id']}").json.get("secret") is None
    assert late_body


def test_a_test_event_is_sent(client, receiver, hook, post):
    answer = client.post(f"{HOOKS}/{hook['id']}/test")

    assert (answer.status_code, answer.json["job_id"], post.go()) == (202, None, 1)
    ((headers, body),) = receiver.got
    assert Webhook(hook["secret"]).verify(body, headers)["type"] == "webhook.test"


def test_the_log_comes_in_pages_and_goes_with_its_time(app, client, hook, end_job, post):
    jobs = [end_job() for _ in range(3)]
    post.go()

    page = client.get(f"{HOOKS}/{hook['id']}/deliveries?limit=2").json
    rest = client.get(f"{HOOKS}/{hook['id']}/deliveries?limit=2&cursor={page['next_cursor']}").json

    assert {one["job_id"] for one in page["items"] + rest["items"]} == set(jobs)
    assert rest["next_cursor"] is None
    assert post.deliveries.prune(DAY_S, 10) == 0
    assert post.deliveries.prune(-1, 2) == 2


def test_an_address_inside_is_refused_by_the_fields_name_and_again_at_the_delivery(
    app, client, receiver, hook, end_job
):
    answer = client.post(HOOKS, json={"url": "https://169.254.169.254/latest"})
    assert (answer.status_code, list(answer.json["errors"])) == (422, ["url"])
    assert client.patch(f"{HOOKS}/{hook['id']}", json={"url": "https://10.0.0.1/"}).status_code == 422
    end_job()
    post = Post(app)
    post.courier = Courier(post.deliveries, Destinations(http=True), log_days=30)

    assert post.go() == 1

    assert receiver.got == []
    assert "not sent to" in log(client, hook)[0]["attempts"][0]["error"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"events": []}, "events"),
        ({"events": ["job.begun"]}, "events.0"),
        ({"events": ["job.failed", "job.failed"]}, "events"),
        ({"job_types": ["sheep"]}, "job_types.0"),
        ({"description": "x" * 256}, "description"),
        ({"secret": "whsec_mine"}, "secret"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_wrong_with_a_webhook_is_said_by_field(client, receiver, body, field):
    given = {"url": receiver.url, **body} if body else {}
    answer = client.post(HOOKS, json=given)

    assert answer.status_code == 422
    assert field in answer.json["errors"]


def test_one_owner_has_so_many_webhooks_and_sees_its_own_alone(client, receiver, make_key):
    ann, ben = make_key("infer"), make_key("infer", "admin")
    made = [client.post(HOOKS, json={"url": receiver.url}, headers=ann) for _ in range(MOST_WEBHOOKS + 1)]

    assert [answer.status_code for answer in made] == [201] * MOST_WEBHOOKS + [409]
    assert made[-1].json["code"] == "too_many_webhooks"
    one = f"{HOOKS}/{made[0].json['id']}"
    assert client.get(HOOKS, headers=ben).json["items"] == []
    calls = [("GET", one), ("PATCH", one), ("DELETE", one), ("GET", f"{one}/deliveries")]
    calls += [("POST", f"{one}/{what}") for what in ("test", "rotate-secret", f"deliveries/{uuid.uuid4()}/replay")]
    for method, path in calls:
        answer = client.open(path, method=method, headers=ben, json={} if method in ("PATCH", "POST") else None)
        assert (answer.status_code, answer.json["code"]) == (404, "webhook_not_found"), (method, path)
    assert client.delete(one, headers=ann).status_code == 204
    assert client.get(one, headers=ann).status_code == 404


# Whatever dies, and however many do it


def insert_job(rows: Rows) -> str:
    job_id = str(uuid.uuid4())
    nothing = ("model", "requested_model", "region_wanted", "queue_timeout_seconds", "idempotency_key", "fingerprint")
    rows.insert(
        job_id,
        **dict.fromkeys(nothing, None),
        owner="ann",
        type=JobType.LLM,
        params="{}",
        priority=0,
        region="asia-east",
        allow_cross_region=True,
        timeout_seconds=60,
    )
    return job_id


def test_each_end_is_told_once_however_many_fold_hand_on_and_send(any_database_url):
    database = open_database(any_database_url)
    rows, deliveries = Rows(database), Deliveries(database)
    jobs = [insert_job(rows) for _ in range(40)]
    with receiving() as receiver:
        values = {"url": receiver.url, "description": "", "events": ["job.completed"], "job_types": [], "enabled": True}
        deliveries.create("ann", **values, most=1)

        def lead(number: int) -> None:
            mine = Rows(database)
            ends = Ends(mine, [Deliveries(database).enter])
            courier = Courier(Deliveries(database), Destinations(LOOPBACK, http=True), log_days=1)
            for job_id in jobs[:: 1 if number else -1]:
                outcome = Envelope(job_id, 1, "w", "asia-east", JobState.COMPLETED, run_s=1, result={})
                mine.end_with(outcome, started_at=None)
                ends.hand_on()
            for _ in range(30):
                with ThreadPoolExecutor(4) as pool:
                    courier.send_due(pool)

        threads = [threading.Thread(target=lead, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        told = [json.loads(body)["data"]["job_id"] for _, body in receiver.got]
        assert sorted(told) == sorted(jobs)
    database.dispose()


def test_an_account_that_fails_leaves_the_ends_for_the_next_time(any_database_url):
    database = open_database(any_database_url)
    rows = Rows(database)
    job_id = insert_job(rows)
    rows.cancel(job_id)
    seen: list[str] = []

    def fail(connection: Any, ended: Any) -> None:
        seen.extend(row.id for row in ended)
        if len(seen) == 1:
            raise RuntimeError("the account is broken")

    ends = Ends(rows, [fail])
    with pytest.raises(RuntimeError):
        ends.hand_on()

    assert (ends.hand_on(), ends.hand_on()) == (1, 0)
    assert seen == [job_id, job_id]
    database.dispose()


def test_an_attempt_of_a_process_that_died_is_made_again_and_a_frozen_webhook_holds_up_no_other(app, client, end_job):
    deliveries: Deliveries = app.extensions["deliveries"]
    destinations = Destinations(LOOPBACK, http=True)
    ends = Ends(app.extensions["dispatch"].rows, [deliveries.enter])
    courier = Courier(deliveries, destinations, log_days=30)
    with receiving() as frozen, receiving() as well:
        frozen.drip_s = 0.1
        hooks = [client.post(HOOKS, json={"url": one.url}).json for one in (frozen, well)]
        for _ in range(3):
            end_job()
        ends.hand_on()
        # Claimed by somebody who is gone.
        assert len(deliveries.take(hooks[1]["id"], 1, lease_s=60)) == 1
        stopped, leads = threading.Event(), threading.Event()
        leads.set()
        thread = threading.Thread(target=courier.run, args=(leads, stopped))
        thread.start()

        until(lambda: len(well.got) == 2)
        assert courier.outcomes[Outcome.RETRIED] == 0, "the frozen one was waited for"
        forward(app, 61)
        until(lambda: len(well.got) == 3)
        assert len(set(well.ids())) == 3
        stopped.set()
        thread.join()


def test_what_control_was_killed_over_is_told_by_the_next_one(database_url, valkey, tmp_path, receiver):
    database = open_database(database_url)
    rows, deliveries = Rows(database), Deliveries(database)
    values = {"url": receiver.url, "description": "", "events": ["job.cancelled"], "job_types": [], "enabled": True}
    deliveries.create("ann", **values, most=1)
    environ = {**os.environ, "DATABASE_URL": database_url, "BLOBS_URL": str(tmp_path / "blobs")}
    environ |= {"GPU_BROKER_URL": f"{valkey.url}/0", "GPU_STORE_URL": f"{valkey.url}/1", "WEBHOOK_ALLOW_HTTP": "1"}
    environ["WEBHOOK_ALLOWED_NETWORKS"] = "127.0.0.0/8"
    receiver.drip_s = 0.1
    process = subprocess.Popen([sys.executable, "-m", "app.control"], cwd=ROOT, env=environ)
    try:
        rows.cancel(insert_job(rows))
        # It has been sent, and is not answered yet.
        until(lambda: receiver.got, 60)
    finally:
        process.kill()
        process.wait()
    rows.cancel(insert_job(rows))
    receiver.drip_s = None

    ends = Ends(rows, [deliveries.enter])
    courier = Courier(deliveries, Destinations(LOOPBACK, http=True), log_days=30)
    for seconds in (0, 61):
        ends.hand_on()
        with database.connect() as connection:
            connection.execute(text("UPDATE webhook_deliveries SET next_at = next_at - :s"), {"s": seconds})
        with ThreadPoolExecutor(4) as pool:
            assert courier.send_due(pool) == 1

    first, other, again = receiver.ids()
    assert first == again != other
    database.dispose()
