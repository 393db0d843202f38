"""A direct worker's server in this process: whom it lets in, what it answers, and what the ledger knows of it."""

import dataclasses
import json
import socket
import threading
import time
import uuid

import pytest
import requests

from engines.catalogue import JobType, Model
from engines.contract import Device, Progress, Text
from engines.echo import Engine as Echo
from engines.llm.schemas import LlmResult
from tasks.direct import DirectServer, bind, public_url
from tasks.duty import Duty
from tasks.fleet import Card
from tasks.headers import DEFAULTS, FIXED
from tasks.job import JobState
from tasks.ledger import Ledger
from tasks.settings import DirectSettings
from tasks.station import Station
from tasks.store import open_store
from tasks.tokens import LEEWAY_S, Token
from tests.rig import until

REGION = "asia-east"
HERE = "127.0.0.1"


class Paused:
    """An engine that writes two pieces, and between them waits for the test while it can be stopped."""

    slots = 1

    def __init__(self):
        self.go = threading.Event()

    def run(self, params, report):
        report(Text("one "))
        while not self.go.wait(0.01):
            report(Progress(1, 2, "token"))
        report(Text("two"))
        return {"response": "one two", "finish_reason": "stop", "model": "m", "usage": {}}

    def close(self):
        self.go.set()


class Served:
    """A station with its direct server on a port."""

    def __init__(self, store_url, engine):
        self.ledger = Ledger(open_store(store_url, timeout_s=2))
        slots = {JobType.LLM: min(engine.slots, 2)}
        self.duty = Duty(slots)
        card = Card("w1", "w1", REGION, "host", "cpu", {JobType.LLM: "echo"}, slots, time.time())
        self.station = Station(card, {JobType.LLM: engine}, self.ledger, duty=self.duty, leave=lambda code: None)
        door = bind(DirectSettings(enabled=True, host=HERE, port=0))
        self.url = f"http://{HERE}:{door.getsockname()[1]}"
        self.server = DirectServer(self.station, self.ledger, door)
        self.server.start()
        self.station.open()

    def token(self, *, secret=None, **changes):
        now = int(time.time())
        token = Token(str(uuid.uuid4()), "w1", "tester", JobType.LLM, HERE, now, now + 60)
        return dataclasses.replace(token, **changes).sign(secret or self.ledger.direct_secret())

    def post(self, text="hello there", *, kind="sync", token=None, **body):
        return requests.post(
            f"{self.url}/api/v1/jobs/{kind}",
            json={"type": "llm", "params": {"messages": [{"role": "user", "content": text}]}, **body},
            headers={"Authorization": f"Bearer {token or self.token()}"},
            stream=kind == "stream",
            timeout=20,
        )

    def close(self):
        self.server.close(0)
        self.station.close()


@pytest.fixture
def make_served(store_url):
    made = []

    def make(engine):
        made.append(Served(store_url, engine))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
def echo(make_served):
    return make_served(Echo(Model("echo", JobType.LLM, "engines.echo", memory_gib=0.0), Device("cpu")))


@pytest.fixture
def paused(make_served):
    engine = Paused()
    served = make_served(engine)
    served.engine = engine
    return served


def events_of(answer):
    """(event, data) as they arrive."""
    name = None
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_every_answer_carries_the_apis_headers_and_the_clients_request_id(echo):
    refused = requests.post(f"{echo.url}/api/v1/jobs/sync", json={}, headers={"X-Request-ID": "mine"}, timeout=20)
    answers = [echo.post(), echo.post(kind="stream"), requests.get(f"{echo.url}/health", timeout=20), refused]

    for answer in answers:
        assert {**FIXED, **DEFAULTS}.items() <= dict(answer.headers).items()
    assert refused.headers["X-Request-ID"] == refused.json()["request_id"] == "mine"
    assert len({answer.headers["X-Request-ID"] for answer in answers}) == len(answers)


def test_a_job_is_answered_in_the_apis_shape_and_the_ledger_has_it(echo):
    answer = echo.post(region="asia-south", priority=3, timeout_seconds=9)

    job = answer.json()
    assert answer.status_code == 200
    assert (job["status"], job["region"], job["worker_id"], job["priority"]) == ("completed", REGION, "w1", 3)
    assert job["created_at"] == job["started_at"] <= job["completed_at"]
    assert LlmResult().validate(job["result"]) == {}
    assert job["result"]["response"] == "hello there"
    assert answer.headers["X-Job-Id"] == job["job_id"]
    record = echo.ledger.look(job["job_id"])
    assert record.outcome.result == job["result"]
    assert (record.direct.owner, record.direct.timeout_seconds) == ("tester", 9)
    assert echo.duty.room(JobType.LLM) == 2


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        ("fail", 500, "engine_error"),
        ("oom", 500, "out_of_memory"),
        ("sleep 20", 504, "run_timeout"),
    ],
)
def test_a_job_that_does_not_complete_is_answered_with_the_job_and_why(echo, said, status, code):
    answer = echo.post(said, timeout_seconds=0.2)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert echo.ledger.look(answer.json()["job_id"]).outcome.error.code == code


def test_a_token_lets_one_job_in(echo):
    token = echo.token()

    first, second = echo.post(token=token), echo.post(token=token)

    assert (first.status_code, second.status_code, second.json()["code"]) == (200, 401, "token_used")
    assert second.headers["WWW-Authenticate"] == "Bearer"
    assert echo.duty.room(JobType.LLM) == 2


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"expires_at": int(time.time()) - LEEWAY_S - 1}, 401, "token_expired"),
        ({"issued_at": int(time.time()) + 3600}, 401, "token_refused"),
        ({"secret": "s" * 64}, 401, "token_refused"),
        ({"worker_id": "w2"}, 403, "token_elsewhere"),
        ({"address": "192.0.2.7"}, 403, "token_elsewhere"),
        ({"type": JobType.VISION}, 409, "wrong_type"),
    ],
    ids=["expired", "of_tomorrow", "foreign_secret", "other_worker", "other_address", "other_type"],
)
def test_a_token_that_is_not_for_this_is_refused(echo, changes, status, code):
    answer = echo.post(token=echo.token(**changes))

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert echo.ledger.look_all([]) == {}
    assert not echo.ledger.store.exists("news")
    assert ("client_address" in answer.json()) is (code == "token_elsewhere")


def test_a_token_that_was_changed_is_refused(echo):
    head, _, signature = echo.token().split(".")
    other = echo.token(owner="admin").split(".")[1]
    unsigned = "eyJhbGciOiJub25lIn0." + other + "."

    codes = [echo.post(token=text).json()["code"] for text in (f"{head}.{other}.{signature}", unsigned, "x", "é" * 9)]

    assert codes == ["token_refused"] * 4
    assert requests.post(f"{echo.url}/api/v1/jobs/sync", timeout=5).json()["code"] == "token_required"


def test_a_proxy_on_the_workers_host_says_who_the_client_is(echo):
    def post(forwarded):
        headers = {"Authorization": f"Bearer {echo.token(address='192.0.2.7')}", "X-Forwarded-For": forwarded}
        body = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
        return requests.post(f"{echo.url}/api/v1/jobs/sync", json=body, headers=headers, timeout=5).status_code

    assert post("10.0.0.1, 192.0.2.7") == 200
    assert post("192.0.2.7, 10.0.0.1") == 403


@pytest.mark.parametrize(
    ("body", "status", "code", "fields"),
    [
        ({"params": {"messages": []}}, 422, "validation_failed", {"params.messages"}),
        ({"priorty": 1}, 422, "validation_failed", {"priorty"}),
        ({"timeout_seconds": 0}, 422, "validation_failed", {"timeout_seconds"}),
        ({"model": "Qwen/Qwen2.5-7B-Instruct"}, 409, "wrong_model", None),
        ({"region": "europe-west", "allow_cross_region": False}, 409, "wrong_region", None),
    ],
    ids=["params", "unknown", "range", "model", "region"],
)
def test_a_job_that_is_wrong_here_is_refused_and_its_token_stays_good(echo, body, status, code, fields):
    token = echo.token()

    answer = echo.post(token=token, **body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert (set(answer.json()["errors"]) if "errors" in answer.json() else None) == fields
    assert echo.post(token=token).status_code == 200


def test_what_is_no_json_or_nowhere_is_refused_as_a_problem(echo):
    headers = {"Authorization": f"Bearer {echo.token()}"}

    def post(data, **more):
        answer = requests.post(f"{echo.url}/api/v1/jobs/sync", data=data, headers={**headers, **more}, timeout=5)
        return answer.status_code, answer.json()["code"]

    assert post("{") == (400, "malformed_body")
    assert post("{}", **{"Content-Type": "text/plain"}) == (415, "not_json")
    assert requests.get(f"{echo.url}/nowhere", timeout=5).json()["code"] == "not_found"
    assert requests.get(f"{echo.url}/api/v1/jobs/sync", timeout=5).json()["code"] == "method_not_allowed"


def test_a_job_beyond_the_slots_is_refused_at_once_and_may_come_again(paused):
    token = paused.token()
    thread = threading.Thread(target=paused.post)
    thread.start()
    until(lambda: paused.duty.room(JobType.LLM) == 0)

    refused = paused.post(token=token)
    paused.engine.go.set()
    thread.join()

    assert (refused.status_code, refused.json()["code"]) == (503, "busy")
    assert paused.post(token=token).status_code == 200


def test_a_stream_arrives_in_pieces_while_the_job_runs(paused):
    events = events_of(paused.post(kind="stream"))

    begun = next(events)
    assert (begun[0], begun[1]["status"]) == ("begun", "running")
    assert next(events) == ("text", {"delta": "one "})
    assert paused.ledger.look(begun[1]["job_id"]).state == "running"
    paused.engine.go.set()
    rest = [event for event in events if event[0] != "progress"]

    assert rest[0] == ("text", {"delta": "two"})
    assert (rest[1][0], rest[1][1]["status"], rest[1][1]["result"]["response"]) == ("ended", "completed", "one two")
    assert len(rest) == 2


@pytest.mark.parametrize("kind", ["sync", "stream"])
def test_a_client_that_hangs_up_cancels_its_job(paused, kind):
    body = json.dumps({"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}})
    request = (
        f"POST /api/v1/jobs/{kind} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {paused.token()}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    with socket.create_connection((HERE, int(paused.url.rpartition(":")[2]))) as connection:
        connection.sendall(request.encode())
        until(lambda: paused.ledger.store.smembers("running:w1"))
        (job_id,) = paused.ledger.store.smembers("running:w1")

    until(lambda: paused.ledger.look(job_id).outcome is not None)
    assert paused.ledger.look(job_id).outcome.outcome is JobState.CANCELLED
    until(lambda: paused.duty.room(JobType.LLM) == 1)


def test_an_owners_cancel_ends_the_job_and_tells_its_client(paused):
    events = events_of(paused.post(kind="stream"))
    job_id = next(events)[1]["job_id"]

    paused.ledger.cancel(job_id)
    paused.station.beat()
    *_, (name, job) = events

    assert (name, job["status"]) == ("ended", "cancelled")


def test_a_draining_worker_refuses_jobs_and_answers_those_that_run(paused):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(paused.post()))
    thread.start()
    until(lambda: paused.duty.room(JobType.LLM) == 0)

    paused.station.drain()
    refused = paused.post()
    closing = threading.Thread(target=paused.server.close, args=[10])
    closing.start()
    paused.engine.go.set()
    thread.join()
    closing.join()

    assert (refused.status_code, refused.json()["code"]) == (503, "closed")
    assert answers[0].json()["status"] == "completed"
    with pytest.raises(requests.ConnectionError):
        paused.post()


def test_without_its_store_a_worker_runs_nothing(echo, valkey):
    token = echo.token()
    valkey.kill()

    answer = echo.post(token=token)

    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert echo.duty.room(JobType.LLM) == 2


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (DirectSettings(public_url="https://gpu.example.com/w1/"), "https://gpu.example.com/w1"),
        (DirectSettings(host="10.1.2.3", port=81), "http://10.1.2.3:81"),
        (DirectSettings(host="::1"), "http://[::1]:8080"),
        (DirectSettings(), "http://127.0.0.1:8080"),
    ],
    ids=["public", "host", "ipv6", "towards_the_store"],
)
def test_where_clients_are_sent(listen, url):
    assert public_url(listen, "redis://127.0.0.1:6390/1") == url
