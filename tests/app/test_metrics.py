"""`GET /metrics` of the API and of control, whom it is shown to, and what it says while a server is away."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from app import control
from app.dispatch import Dispatch
from app.ends import Ends
from app.gauges import READ_S, desired_workers
from app.keys import Keys, Scope
from app.metrics import ControlServer
from app.settings import Settings
from engines.catalogue import JobType
from tasks.fleet import Card
from tests.app.conftest import CHAT, REGION
from tests.rig import free_port, until

JOBS = "/api/v1/jobs"
LLM = {"region": REGION, "type": "llm"}


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Value by name and labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    """The sum of the samples that have these labels, and maybe others; None where there is none."""
    found = [
        number
        for (known, has), number in samples(text).items()
        if known == name and labels.items() <= dict(has).items()
    ]
    return sum(found) if found else None


class Control:
    """A control process's work and port, in threads."""

    def __init__(self, dispatch: Dispatch, keys: Keys, settings: Settings) -> None:
        self.url = f"http://127.0.0.1:{settings.control_metrics_port}/metrics"
        self._stopped = threading.Event()
        chores = [ControlServer(dispatch, keys, settings), Ends(dispatch.rows, [dispatch.metering.account])]
        self._thread = threading.Thread(
            target=control.run, args=(dispatch, self._stopped), kwargs={"chores": chores}, daemon=True
        )
        self._thread.start()
        until(lambda: value(self.text(), "gpu_control_leader"))

    def text(self, **headers: str) -> str:
        """What it shows."""
        answer = requests.get(self.url, headers=headers, timeout=10)
        return answer.text if answer.ok else ""

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


@pytest.fixture
def scraped(make_app: Callable[[Settings], Any], settings: Settings) -> Iterator[Control]:
    """A leading control process of a database and stores of its own, apart from the API's."""
    settings = replace(settings, control_metrics_port=free_port())
    extensions = make_app(settings).extensions
    made = Control(extensions["dispatch"], extensions["keys"], settings)
    yield made
    made.stop()


def test_the_api_counts_requests_and_accepted_jobs_once_each(client):
    for _ in range(2):
        client.post(JOBS, json=CHAT)
    client.post(JOBS, json=CHAT, headers={"Idempotency-Key": "one"})
    client.post(JOBS, json=CHAT, headers={"Idempotency-Key": "one"})
    client.post(JOBS, json={"type": "none"})
    client.get("/no/such/path")
    client.open("/api/v1/jobs", method="BREW")

    text = client.get("/metrics").text

    assert value(text, "gpu_jobs_accepted_total", **LLM) == 3
    created = {"endpoint": "jobs.create", "method": "POST"}
    assert value(text, "gpu_http_requests_total", status="202", **created) == 4
    assert value(text, "gpu_http_requests_total", status="422", **created) == 1
    assert value(text, "gpu_http_request_duration_seconds_count", **created) == 5
    assert value(text, "gpu_http_requests_total", endpoint="none", status="404") == 1
    assert value(text, "gpu_http_requests_total", method="other") == 1
    # Of the whole platform only control knows.
    assert value(text, "gpu_queue_jobs") is None


def test_control_counts_each_end_once_with_its_times_and_tokens(scraped, client, worker):
    worker.show()
    done, cancelled = (client.post(JOBS, json=CHAT).json["job_id"] for _ in range(2))

    worker.begin(done)
    worker.finish(done)
    client.delete(f"{JOBS}/{cancelled}")
    until(lambda: value(scraped.text(), "gpu_jobs_ended_total") == 2)

    text = scraped.text()
    assert value(text, "gpu_jobs_ended_total", outcome="completed", **LLM) == 1
    assert value(text, "gpu_jobs_ended_total", outcome="cancelled", **LLM) == 1
    assert value(text, "gpu_job_duration_seconds_count", **LLM) == 2
    assert value(text, "gpu_job_queue_duration_seconds_count", **LLM) == 1
    assert value(text, "gpu_job_run_duration_seconds_count", **LLM) == 1
    assert value(text, "gpu_tokens_total", model="echo", kind="prompt") == 10
    assert value(text, "gpu_tokens_total", model="echo", kind="completion") == 15
    assert (value(text, "gpu_control_ticks_total") or 0) > 0
    # What the API counts is not counted again here.
    assert value(text, "gpu_jobs_accepted_total") is None


def test_control_shows_queues_workers_and_how_many_there_should_be(scraped, client, worker):
    card = Card(worker.id, "w", REGION, "host", "cuda:0", {JobType.LLM: "echo"}, {JobType.LLM: 2}, time.time())
    card = replace(card, busy={JobType.LLM: 1}, batch={JobType.LLM: 1}, gpu_memory_gib=24.0, gpu_memory_used_gib=6.0)
    worker.ledger.presence.beat(worker.id, card.encode(), [])
    ids = [client.post(JOBS, json=CHAT).json["job_id"] for _ in range(7)]
    worker.begin(ids[0])
    worker.store.set("discarded", 3)
    worker.store.set("forged", 2)

    until(lambda: value(scraped.text(), "gpu_queue_jobs", **LLM) == 6)

    text = scraped.text()
    shown = {
        "gpu_running_jobs": 1,
        "gpu_slots": 2,
        "gpu_slots_busy": 1,
        "gpu_ready_workers": 1,
        "gpu_batch_jobs": 1,
        "gpu_batches": 1,
        # Seven jobs by two slots a worker.
        "gpu_desired_workers": 4,
    }
    assert {name: value(text, name, **LLM) for name in shown} == shown
    assert value(text, "gpu_queue_oldest_wait_seconds", **LLM) > 0
    assert value(text, "gpu_workers", region=REGION, state="ready") == 1
    assert value(text, "gpu_memory_used_bytes", region=REGION) == 6 * 2**30
    assert value(text, "gpu_outcomes_discarded_total") == 3
    assert value(text, "gpu_outcomes_forged_total") == 2
    assert value(text, "gpu_region_up") == 8
    assert value(text, "gpu_database_up") == 1
    assert value(text, "gpu_disk_free_bytes", holds="database") > 0


def test_jobs_that_wait_for_their_turn_are_counted_among_those_that_wait(scraped, make_app, settings, worker):
    client = make_app(replace(settings, fair_window=2)).test_client()
    worker.show()
    window = 8

    for _ in range(window + 3):
        client.post(JOBS, json=CHAT)

    assert len(worker.waiting()) == window
    # Two slots for each worker.
    shown = {"gpu_queue_jobs": window + 3, "gpu_desired_workers": 6}
    until(lambda: {name: value(scraped.text(), name, **LLM) for name in shown} == shown)


def test_a_store_that_is_away_is_shown_as_down_at_once(scraped, client, valkey):
    client.post(JOBS, json=CHAT)
    until(lambda: value(scraped.text(), "gpu_queue_jobs", **LLM) == 1)

    valkey.stop()
    began = time.monotonic()
    until(lambda: value(scraped.text(), "gpu_region_up", part="store") == 0)

    assert time.monotonic() - began < 3 * READ_S + 2
    text = scraped.text()
    assert value(text, "gpu_queue_jobs") is None
    assert value(text, "gpu_database_up") == 1
    valkey.cont()
    until(lambda: value(scraped.text(), "gpu_queue_jobs", **LLM) == 1)


def test_only_the_leader_shows_the_platform(scraped, make_app, settings):
    other = replace(settings, control_metrics_port=free_port())
    extensions = make_app(other).extensions
    stopped, leads = threading.Event(), threading.Event()
    server = ControlServer(extensions["dispatch"], extensions["keys"], other)
    running = threading.Thread(target=server.run, args=(leads, stopped), daemon=True)
    running.start()

    text = requests.get(f"http://127.0.0.1:{other.control_metrics_port}/metrics", timeout=5).text

    assert value(text, "gpu_control_leader") == 0
    assert value(text, "gpu_region_up") is None
    assert value(scraped.text(), "gpu_region_up") == 8
    stopped.set()
    running.join()


def test_once_there_are_keys_both_ports_ask_for_one_that_may_read(scraped, client, make_key):
    keys = {scope: make_key(scope)["X-API-Key"] for scope in (Scope.READ, Scope.ADMIN, Scope.INFER)}
    bearers = {scope: {"Authorization": f"Bearer {key}"} for scope, key in keys.items()} | {None: {}}

    # It looks for the first key every so often.
    until(lambda: requests.get(scraped.url, timeout=5).status_code == 401)

    right = {Scope.READ: 200, Scope.ADMIN: 200, Scope.INFER: 403, None: 401}
    assert {who: client.get("/metrics", headers=sent).status_code for who, sent in bearers.items()} == right
    assert {
        who: requests.get(scraped.url, headers=sent, timeout=5).status_code for who, sent in bearers.items()
    } == right


@pytest.mark.parametrize(
    ("queued", "running", "slots", "present", "wait_s", "desired"),
    [
        pytest.param(0, 0, 4, 3, 0, 0, id="nothing to do"),
        pytest.param(0, 5, 4, 2, 0, 2, id="what runs"),
        pytest.param(9, 4, 4, 1, 0, 4, id="what waits, too"),
        pytest.param(1, 4, 8, 1, 10, 2, id="one more for a long wait"),
        pytest.param(1, 0, 1, 0, 10, 1, id="the first one"),
    ],
)
def test_desired_workers(queued, running, slots, present, wait_s, desired):
    assert desired_workers(queued, running, slots, present, wait_s) == desired
