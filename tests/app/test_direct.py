"""Which worker the API sends a client to, what becomes of the job that it brings there, and how the SDK does it."""

import contextlib
import ipaddress
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

import jwt
import pytest
import requests
from werkzeug.serving import make_server

from app.client import GPUInferenceClient, JobNotCompleted
from app.control import Reconciler
from app.rows import Rows
from app.tables import open_database
from engines.catalogue import JobType
from tasks.fleet import Card, WorkerState
from tasks.job import DirectJob, Envelope, Job, JobState
from tasks.ledger import Ledger
from tasks.store import open_store
from tests.rig import free_port, until

NEAREST = "/api/v1/jobs/direct/nearest"
MESSAGES = [{"role": "user", "content": "hello there"}]
SEED = {"worker_id", "direct_url", "region", "client_region", "gpu_model", "reliability_score"}


class Fleet:
    """Cards of direct workers, and what is known of their reliability."""

    def __init__(self, store_url):
        self.store = open_store(store_url, timeout_s=2)
        self.ledger = Ledger(self.store)

    def show(self, name, region="asia-east", *, job_type=JobType.LLM, slots=2, busy=0, good=100, faults=0, **changes):
        values = {
            "worker_id": f"{name}-1",
            "name": name,
            "region": region,
            "host": "host",
            "device": "cuda:0",
            "models": {job_type: "echo"},
            "slots": {job_type: slots},
            "busy": {job_type: busy},
            "started_at": time.time(),
            "gpu_name": "NVIDIA RTX 4090",
            "direct_url": f"http://{name}:8080",
        }
        card = Card(**{**values, **changes})
        self.ledger.presence.beat(card.worker_id, card.encode(), [], name=name)
        self.store.hset(f"reliability:{name}", mapping={"good": good, "faults": faults, "at": time.time() + 60})


@pytest.fixture
def fleet(store_url):
    return Fleet(store_url)


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    """An app on a port of its own; its URL."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def url(app) -> Iterator[str]:
    with listening(app) as url:
        yield url


def test_the_answer_has_the_seeds_fields_and_a_token_for_that_worker(client, fleet):
    fleet.show("w1")

    answer = client.get(NEAREST, query_string={"job_type": "llm", "client_address": "::ffff:192.0.2.7"})

    assert set(answer.json) == SEED | {"token", "expires_at"}
    assert {name: answer.json[name] for name in SEED} == {
        "worker_id": "w1-1",
        "direct_url": "http://w1:8080",
        "region": "asia-east",
        "client_region": "asia-east",
        "gpu_model": "NVIDIA RTX 4090",
        "reliability_score": 0.9955,
    }
    claims = jwt.decode(answer.json["token"], fleet.ledger.direct_secret(), ["HS256"], audience="w1-1")
    assert (claims["sub"], claims["type"], claims["addr"]) == ("local", "llm", "192.0.2.7")
    assert claims["exp"] - claims["iat"] == 60
    assert uuid.UUID(claims["jti"])


@pytest.fixture
def chosen(client):
    """Waits until a worker is the one that is offered: cards are read twice a second."""

    def wait(worker_id, **query):
        answer = {}

        def look():
            answer.update(client.get(NEAREST, query_string={"job_type": "llm", **query}).json)
            return answer.get("worker_id") == worker_id

        until(look)
        return answer

    return wait


def test_the_order_is_distance_then_reliability_then_free_slots(fleet, chosen):
    fleet.show("far", "europe-west")
    chosen("far-1")
    fleet.show("next", "asia-south", good=5, faults=1)
    chosen("next-1")
    assert chosen("far-1", region="europe-west")["client_region"] == "europe-west"
    fleet.show("newcomer", good=10)
    fleet.show("proven", good=100)
    chosen("proven-1")
    fleet.show("roomier", good=100, slots=9, state=WorkerState.DRAINING)
    fleet.show("roomy", good=100, slots=8)
    chosen("roomy-1")


def test_who_is_unreliable_full_or_of_another_kind_is_passed_over(client, fleet, chosen):
    fleet.show("bad", good=1, faults=100)
    fleet.show("queue-only", direct_url=None)
    fleet.show("other", job_type=JobType.VISION)
    fleet.show("off", state=WorkerState.OFF_DUTY)
    assert client.get(NEAREST, query_string={"job_type": "llm"}).json["code"] == "no_direct_worker"

    fleet.show("full", busy=2)
    fleet.show("free", "america-north")
    chosen("free-1")
    chosen("full-1", allow_cross_region="false")


def test_without_a_direct_worker_the_answer_is_404_with_a_code(client, fleet):
    fleet.show("far", "europe-west")

    for query in ({"job_type": "vision"}, {"job_type": "llm", "allow_cross_region": "false"}):
        answer = client.get(NEAREST, query_string=query)
        assert (answer.status_code, answer.json["code"]) == (404, "no_direct_worker")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({}, "job_type"),
        ({"job_type": "poetry"}, "job_type"),
        ({"job_type": "llm", "region": "mars"}, "region"),
        ({"job_type": "llm", "model": "none/such"}, "model"),
        ({"job_type": "llm", "client_address": "home"}, "client_address"),
        ({"job_type": "llm", "typ": "1"}, "typ"),
    ],
    ids=["missing", "type", "region", "model", "address", "unknown"],
)
def test_a_wrong_question_is_refused_by_field(client, query, field):
    answer = client.get(NEAREST, query_string=query)

    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])


def test_only_who_may_send_jobs_gets_a_token(client, fleet, make_key):
    fleet.show("w1")

    assert client.get(NEAREST, query_string={"job_type": "llm"}, headers=make_key("read")).status_code == 403
    assert client.get(NEAREST, query_string={"job_type": "llm"}, headers=make_key("infer")).status_code == 200


def ticket_for(app, job_id):
    """What the token of a job for a worker in asia-east carries."""
    return app.extensions["dispatch"].tickets.sign(job_id, 1, "asia-east")


def brought(app, fleet, owner="local"):
    """A job that a client brought to worker w1-1, as the ledger has it."""
    job_id = str(uuid.uuid4())
    ticket = ticket_for(app, job_id)
    direct = DirectJob(owner, JobType.LLM, None, None, 3, "asia-east", "asia-east", True, 30.0, ticket)
    assert fleet.ledger.enter(job_id, direct, worker_id="w1-1") is not None
    return job_id


def test_a_direct_job_has_a_row_while_it_runs_and_one_outcome(client, app, fleet):
    fleet.show("w1")
    reconciler, job_id = Reconciler(app.extensions["dispatch"]), brought(app, fleet)

    reconciler.tick()
    running = client.get(f"/api/v1/jobs/{job_id}").json
    fleet.ledger.finish(
        Envelope(
            *(job_id, 1, "w1-1", "asia-east", JobState.COMPLETED, 0.5, {"response": "hi"}),
            ticket=ticket_for(app, job_id),
        ),
        queue="asia-east.llm",
    )
    reconciler.tick()
    reconciler.tick()

    job = client.get(f"/api/v1/jobs/{job_id}").json
    assert (running["status"], running["worker_id"], running["priority"]) == ("running", "w1-1", 3)
    assert (job["status"], job["result"], job["attempt"]) == ("completed", {"response": "hi"}, 1)
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    assert [item["job_id"] for item in client.get("/api/v1/jobs").json["items"]] == [job_id]
    assert app.extensions["dispatch"].look(job_id, "somebody else") is None
    assert 0 < fleet.store.ttl(f"job:{job_id}") <= 600


def test_a_row_is_made_of_a_direct_job_once_and_never_due(any_database_url):
    rows = Rows(open_database(any_database_url))
    job_id, direct = str(uuid.uuid4()), DirectJob("o", JobType.LLM, "m", "M", 9, "asia-east", None, False, -30.0)

    row = rows.adopt(job_id, direct, worker_id="w1", started_at=1_700_000_000.0)

    assert (row.status, row.worker_id, row.model, row.priority) == (JobState.RUNNING, "w1", "m", 9)
    assert row.created_at == row.started_at == 1_700_000_000.0
    assert rows.adopt(job_id, direct, worker_id="w1", started_at=None) is None
    assert rows.due(10) == []
    assert [late.id for late in rows.ran_too_long(10)] == [job_id]


def test_a_direct_job_whose_worker_is_lost_fails_and_is_not_run_again(client, app, fleet):
    fleet.show("w1")
    reconciler = Reconciler(app.extensions["dispatch"])
    lost, given_up = brought(app, fleet), brought(app, fleet)
    reconciler.tick()

    fleet.ledger.release(Job(given_up, JobType.LLM, 1), worker_id="w1-1")
    fleet.ledger.presence.retire("w1-1", name="w1", told=False)
    for _ in range(3):
        reconciler.tick()

    for job_id in (lost, given_up):
        job = client.get(f"/api/v1/jobs/{job_id}").json
        assert (job["status"], job["error"]["code"], job["attempt"]) == ("failed", "worker_lost", 1)
        assert 0 < fleet.store.ttl(f"job:{job_id}") <= 600
    assert fleet.ledger.queues() == {}


def test_the_sdk_falls_back_to_the_queue(url, fleet, worker, chosen):
    sdk = GPUInferenceClient(url)
    thread = worker.answer_next()
    assert sdk.direct("llm", {"messages": MESSAGES}, timeout=10)["status"] == "completed"
    thread.join()

    fleet.show("w1", direct_url=f"http://127.0.0.1:{free_port()}")
    chosen("w1-1")
    thread = worker.answer_next()
    assert sdk.direct("llm", {"messages": MESSAGES}, timeout=10)["worker_id"] == worker.id
    thread.join()


def test_from_the_nearest_worker_to_the_end_of_its_service(platform, client, url, make_app, settings):
    worker = platform.start_worker(
        GPU_DIRECT_ENABLED="true",
        GPU_DIRECT_HOST="127.0.0.1",
        GPU_DIRECT_PORT=str(free_port()),
        GPU_MAX_CONCURRENT_JOBS="1",
    )
    sdk = GPUInferenceClient(url)
    queued = sdk.chat(MESSAGES, temperature=0)

    job = sdk.direct("llm", {"messages": MESSAGES, "temperature": 0})

    assert job["result"] == queued["result"]
    assert job["worker_id"] == queued["worker_id"] == worker.id
    assert set(job) == set(queued)
    until(lambda: client.get(f"/api/v1/jobs/{job['job_id']}").status_code == 200)
    row = client.get(f"/api/v1/jobs/{job['job_id']}").json
    assert row["result"] == queued["result"]

    # Where the API sees the client at another address than the worker does, the SDK says so and asks again.
    proxied = replace(settings, trusted_proxies=[ipaddress.ip_network("127.0.0.1")], allow_anonymous=True)
    with listening(make_app(proxied)) as behind:
        elsewhere = GPUInferenceClient(behind)
        elsewhere.session.headers["X-Forwarded-For"] = "192.0.2.7"
        made = elsewhere.direct("llm", {"messages": MESSAGES})
    # One that went through the queue has waited.
    assert made["created_at"] == made["started_at"]

    # Its slot is taken: the job waits in the queue until the direct one is cancelled.
    offer = client.get(NEAREST, query_string={"job_type": "llm"}).json
    params = {"messages": [{"role": "user", "content": "sleep 60"}]}
    stream = requests.post(
        f"{offer['direct_url']}/api/v1/jobs/stream",
        json={"type": "llm", "params": params},
        headers={"Authorization": f"Bearer {offer['token']}"},
        stream=True,
        timeout=20,
    )
    job_id = stream.headers["X-Job-Id"]
    waiting = sdk.submit("llm", {"messages": MESSAGES})["job_id"]
    until(lambda: client.get(f"/api/v1/jobs/{job_id}").json.get("progress"))
    assert client.get(f"/api/v1/jobs/{waiting}").json["status"] == "queued"
    assert client.delete(f"/api/v1/jobs/{job_id}").status_code == 200
    assert '"status":"cancelled"' in list(stream.iter_lines(decode_unicode=True))[-2]
    assert sdk.wait(waiting, timeout=10)["status"] == "completed"

    # SIGTERM: what runs may end, nothing is taken any more, and then nobody listens.
    found = []

    def bring() -> None:
        try:
            found.append(sdk.direct("llm", {"messages": [{"role": "user", "content": "sleep 1.5"}]}))
        except JobNotCompleted as error:
            found.append(error.job)

    thread = threading.Thread(target=bring)
    thread.start()
    until(lambda: platform.dispatch.links["asia-east"].mailbox.ledger.store.smembers(f"running:{worker.id}"))
    worker.signal(signal.SIGTERM)
    thread.join()
    worker.process.wait(30)

    assert (found[0]["status"], found[0]["worker_id"]) == ("completed", worker.id)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{offer['direct_url']}/health", timeout=2)
