"""Outcomes that no worker of ours wrote: ignored, counted, told of as an alarm, and the job goes on."""

import json
import threading
from collections.abc import Mapping
from dataclasses import replace

import pytest

from app.control import Reconciler
from app.tables import open_database
from app.tickets import Tickets
from engines.catalogue import JobType
from tasks.job import DirectJob, Envelope, Job, JobState
from tasks.ledger import Ledger
from tasks.settings import load_regions
from tasks.store import open_store
from tests.app.conftest import CHAT, QUEUE, REGION
from tests.rig import until

JOBS = "/api/v1/jobs"
LIE = {"response": "a lie"}


def forge(ledger: Ledger, job_id: str, **changes) -> Envelope:
    """What somebody hands in who was never given the job."""
    stated = {"attempt": 1, "worker_id": "mallory", "region": REGION, "ticket": "A" * 22, **changes}
    said = Envelope(job_id, outcome=JobState.COMPLETED, run_s=1.0, result=LIE, **stated)
    outcome = {"state": "ended", "attempt": said.attempt, "worker": said.worker_id, "outcome": said.encode()}
    ledger.store.hset(f"job:{job_id}", mapping=outcome)
    ledger.store.zadd("news", {job_id: 1})
    ledger.store.rpush(f"done:{job_id}", f" {said.encode()}")
    return said


def complete(ledger: Ledger, job_id: str, attempt: int, result: Mapping[str, str], region: str = REGION) -> None:
    """Run an attempt as a worker does."""
    claim = ledger.begin(Job(job_id, JobType.LLM, attempt), worker_id="w", token="t")
    said = Envelope(job_id, attempt, "w", region, JobState.COMPLETED, 0.1, result, ticket=claim.ticket)
    assert ledger.finish(said, queue=QUEUE)


@pytest.mark.parametrize("begun", [False, True], ids=["queued", "running"])
def test_a_forged_outcome_is_ignored_and_counted_and_the_job_runs_on(client, app, worker, caplog, begun):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    if begun:
        worker.begin(job_id)
        client.get(f"{JOBS}/{job_id}")
    forge(worker.ledger, job_id)

    Reconciler(app.extensions["dispatch"]).tick()

    shown = client.get(f"{JOBS}/{job_id}").json
    assert (shown["status"], shown["attempt"]) == ("running" if begun else "queued", 2)
    assert worker.ledger.forged() == 1
    assert f"ALARM: job {job_id}" in caplog.text
    assert "lie" not in caplog.text
    complete(worker.ledger, job_id, 2, {"response": "the truth"})
    assert client.get(f"{JOBS}/{job_id}").json["result"] == {"response": "the truth"}


def test_who_waits_for_a_job_is_not_told_a_forged_outcome(client, app, worker):
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.post(f"{JOBS}/sync?timeout=20", json=CHAT)))
    asking.start()
    job_id = worker.next_job()
    worker.begin(job_id)

    forge(worker.ledger, job_id)
    reconciler = Reconciler(app.extensions["dispatch"])
    until(lambda: reconciler.send_due() or worker.waiting() == [job_id])
    complete(worker.ledger, job_id, 2, {"response": "the truth"})
    asking.join()

    assert answers[0].json["result"] == {"response": "the truth"}


def test_a_ticket_of_another_job_opens_nothing(client, app, worker):
    mine, other = (client.post(JOBS, json=CHAT).json["job_id"] for _ in range(2))
    ticket = worker.ledger.begin(Job(mine, JobType.LLM, 1), worker_id="w", token="t").ticket
    forge(worker.ledger, other, ticket=ticket)
    # The whole of another job's outcome, where this one's should be.
    said = Envelope(mine, 1, "w", REGION, JobState.COMPLETED, 1.0, LIE, ticket=ticket).encode()
    third = client.post(JOBS, json=CHAT).json["job_id"]
    worker.ledger.store.hset(f"job:{third}", mapping={"state": "ended", "outcome": said})

    states = [client.get(f"{JOBS}/{job_id}").json["status"] for job_id in (other, third, mine)]

    assert states == ["queued", "queued", "running"]
    assert worker.ledger.forged() == 2


def test_a_worker_of_another_region_cannot_answer_for_this_one(make_app, settings, valkey, worker):
    stores = {REGION: f"{valkey.url}/1", "europe-west": f"{valkey.url}/2"}
    regions = load_regions({"REGIONS": json.dumps({name: {"store": url} for name, url in stores.items()})})
    broker = settings.regions[REGION].broker
    regions = {name: replace(region, broker=broker) for name, region in regions.items()}
    app = make_app(replace(settings, regions=regions))
    client = app.test_client()
    job_id = client.post(JOBS, json={**CHAT, "region": REGION}).json["job_id"]
    far = Ledger(open_store(stores["europe-west"], timeout_s=2))
    forge(far, job_id)

    Reconciler(app.extensions["dispatch"]).tick()

    # What is at home was not even touched.
    shown = client.get(f"{JOBS}/{job_id}").json
    assert (shown["status"], shown["attempt"], far.forged()) == ("queued", 1, 1)
    complete(worker.ledger, job_id, 1, {"response": "the truth"})
    assert client.get(f"{JOBS}/{job_id}").json["status"] == "completed"


def test_nobody_can_make_up_a_direct_job_in_anothers_name(client, app, worker, caplog):
    job_id = "0e8f4c3a-5a1c-4f0e-9a52-0c3d5e7f9b11"
    made_up = DirectJob("local", JobType.LLM, None, None, 0, REGION, None, True, 30.0, ticket="A" * 22)
    worker.ledger.enter(job_id, made_up, worker_id="mallory")

    Reconciler(app.extensions["dispatch"]).tick()

    assert client.get(f"{JOBS}/{job_id}").status_code == 404
    assert job_id in caplog.text


def test_all_processes_on_one_database_sign_alike(any_database_url):
    engines = [open_database(any_database_url) for _ in range(2)]
    first, second = map(Tickets, engines)

    ticket = first.sign("job", 2, "asia-east")

    assert second.good(ticket, "job", 2, "asia-east")
    others = [("job2", 2, "asia-east"), ("job", 1, "asia-east"), ("job", 2, "asia-south")]
    assert not any(second.good(ticket, *other) for other in others)
    assert not any(second.good(wrong, "job", 2, "asia-east") for wrong in ("", ticket[:-1], "é\ud800"))
    for engine in engines:
        engine.dispose()
