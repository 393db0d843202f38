"""`POST /api/v1/jobs?dry_run=true`: where a job would go, why, and how long it would wait, without a trace of it."""

import re
import time
from dataclasses import replace

import pytest

from app.links import FRESH_S
from app.schemas import DryRunView
from engines.catalogue import JobType
from tasks.fleet import Card, WorkerState
from tests.rig import free_port

CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
DRY = "/api/v1/jobs?dry_run=true"


@pytest.fixture
def show(worker):
    """Make a worker live for one lease, anywhere."""

    def show(region, *, name="w", model="echo", slots=2, state=WorkerState.READY):
        llm = JobType.LLM
        ids = (f"{region}-{name}", name, region, "host", "cpu")
        card = Card(*ids, {llm: model}, {llm: slots}, time.time(), state=state)
        worker.ledger.presence.beat(card.worker_id, card.encode(), [])

    return show


@pytest.fixture
def occupy(client, worker):
    """Have a job run in asia-east, and the API know it."""

    def occupy():
        sent = client.post("/api/v1/jobs", json={**CHAT, "region": "asia-east", "allow_cross_region": False})
        worker.begin(sent.json["job_id"])
        time.sleep(FRESH_S)  # for so long it may go by what it last read

    return occupy


def dry(client, **body):
    answer = client.post(DRY, json={**CHAT, **body})
    assert answer.status_code == 200, answer.json
    return answer.json


def test_nothing_is_sent_and_nothing_is_kept(client, worker, show, app):
    show("asia-east")

    dry(client, region="asia-east", priority=3)

    assert client.get("/api/v1/jobs").json["items"] == []
    assert worker.store.exists("queues", "wait:asia-east.llm", "seq") == 0
    assert client.post(DRY, json=CHAT, headers={"Idempotency-Key": "k"}).status_code == 200
    assert (
        client.post("/api/v1/jobs", json={**CHAT, "priority": 1}, headers={"Idempotency-Key": "k"}).status_code == 202
    )


def test_the_body_is_checked_as_that_of_a_real_job(client):
    for wrong in ({"region": "mars"}, {"priority": 10}, {"params": {}}, {"type": "chess"}, {"model": "none"}, {"x": 1}):
        real, dry_run = (client.post(path, json={**CHAT, **wrong}) for path in ("/api/v1/jobs", DRY))
        assert (dry_run.status_code, dry_run.json["errors"]) == (422, real.json["errors"])
    assert client.post("/api/v1/jobs?dry_run=perhaps", json=CHAT).status_code == 422
    assert client.post("/api/v1/jobs/sync?dry_run=true", json=CHAT).status_code == 422


def test_a_free_slot_at_home(client, show):
    show("asia-east")
    show("asia-east", name="other")
    show("asia-east", name="gone", state=WorkerState.DRAINING)

    assert dry(client) == {
        "region": "asia-east",
        "reason": "asia-east has a free slot for llm.",
        "client_region": "asia-east",
        "origin": "default",
        "estimated_wait_seconds": 0,
        "queue_position": 1,
        "available_workers": 2,
        "model": "echo",
    }


def test_the_nearest_live_region_where_nobody_serves_at_home(client, show):
    show("asia-south", model="Qwen/Qwen2.5-7B-Instruct")
    show("asia-south", name="other")
    show("america-north")

    answer = dry(client, region="asia-east")
    named = dry(client, region="asia-east", model="Qwen/Qwen2.5-7B-Instruct")
    pinned = dry(client, region="asia-east", allow_cross_region=False)

    assert (answer["region"], answer["client_region"], answer["origin"]) == ("asia-south", "asia-east", "request")
    assert answer["reason"].startswith(
        "No live worker serves llm in asia-east. asia-south, 3805 km away, is the nearest"
    )
    assert (answer["available_workers"], answer["model"]) == (2, None)
    assert (named["region"], named["available_workers"], named["model"]) == (
        "asia-south",
        1,
        "Qwen/Qwen2.5-7B-Instruct",
    )
    assert pinned == {
        "region": "asia-east",
        "reason": "It may not leave asia-east. No live worker serves llm in asia-east.",
        "client_region": "asia-east",
        "origin": "request",
        "estimated_wait_seconds": None,
        "queue_position": 1,
        "available_workers": 0,
        "model": None,
    }


def test_what_it_says_comes_true_for_every_priority(client, worker, show, occupy):
    worker.store.hset("speed:asia-east.llm", "mean_s", "30")
    show("asia-east", slots=1)
    occupy()
    for priority in (0, 5, 5, 9):
        client.post("/api/v1/jobs", json={**CHAT, "priority": priority})

    for priority in (9, 5, 0):
        told = dry(client, priority=priority)
        real = client.post("/api/v1/jobs", json={**CHAT, "priority": priority}).json
        assert told["queue_position"] == real["queue_position"]
        assert told["estimated_wait_seconds"] == pytest.approx(real["estimated_wait_seconds"], abs=2)


def test_a_job_leaves_a_crowded_region_and_a_pinned_one_does_not(client, worker, show, occupy):
    worker.store.hset("speed:asia-east.llm", "mean_s", "30")
    show("asia-east", slots=1)
    show("europe-west", slots=1)
    occupy()

    answer = dry(client)
    first, second = (client.post("/api/v1/jobs", json=CHAT).json for _ in range(2))
    pinned = client.post("/api/v1/jobs", json={**CHAT, "allow_cross_region": False}).json

    assert re.match(
        r"It would wait about (30|29|28) s in asia-east and 0 s in europe-west, 88\d\d km", answer["reason"]
    )
    regions = [client.get(f"/api/v1/jobs/{job['job_id']}").json["region"] for job in (first, second, pinned)]
    # The second of them at once finds the free slot taken, although no worker has said so yet.
    assert regions == ["europe-west", "asia-east", "asia-east"]


def test_a_job_keeps_the_region_of_its_client_whatever_becomes_of_it(client, app, show):
    show("europe-west")

    ids = [client.post("/api/v1/jobs", json={**CHAT, **body}).json["job_id"] for body in ({}, {"region": "asia-south"})]

    rows = [app.extensions["dispatch"].rows.get(job_id) for job_id in ids]
    assert [(row.region_wanted, row.region) for row in rows] == [
        ("asia-east", "europe-west"),
        ("asia-south", "europe-west"),
    ]


def test_who_will_not_wait_for_a_worker_is_refused_where_the_job_may_run_nowhere(client, show):
    sync = "/api/v1/jobs/sync?wait_for_worker=false&timeout=0.05"
    assert client.post(sync, json=CHAT).status_code == 503

    show("america-north")

    time.sleep(FRESH_S)
    pinned = client.post(sync, json={**CHAT, "allow_cross_region": False})
    assert (pinned.status_code, pinned.json["code"]) == (503, "no_worker")
    # Taken to the other region, where nobody hurries.
    assert client.post(sync, json=CHAT).status_code == 504


def test_a_region_whose_store_or_broker_is_dead_is_left_but_for_pinned_jobs(make_app, settings, show):
    dead = f"redis://127.0.0.1:{free_port()}/0"
    regions = {
        **settings.regions,
        "asia-east": replace(settings.regions["asia-east"], store=dead),
        "asia-south": replace(settings.regions["asia-south"], broker=dead),
    }
    client = make_app(replace(settings, regions=regions)).test_client()
    for region in ("asia-south", "europe-west"):
        show(region)

    no_store, pinned = dry(client), dry(client, allow_cross_region=False)
    kept = client.post("/api/v1/jobs", json={**CHAT, "allow_cross_region": False})
    no_broker = dry(client, region="asia-south")

    # Not in asia-south, which is nearer.
    assert no_store["region"] == "europe-west"
    assert no_store["reason"].startswith("asia-east cannot be reached.")
    assert (pinned["region"], pinned["queue_position"], pinned["estimated_wait_seconds"]) == ("asia-east", None, None)
    assert (kept.status_code, kept.json["status"]) == (202, "queued")
    assert client.get(f"/api/v1/jobs/{kept.json['job_id']}").json["region"] == "asia-east"
    assert no_broker["region"] == "europe-west"
    assert no_broker["reason"].startswith("asia-south cannot be reached.")


def test_the_document_shows_it(client):
    create = client.get("/openapi.json").json["paths"]["/api/v1/jobs"]["post"]
    content = create["responses"]["200"]["content"]["application/json"]

    assert "dry_run" in [parameter.get("name") for parameter in create["parameters"]]
    for example in content["examples"].values():
        assert set(example["value"]) == set(DryRunView().fields)
        assert DryRunView().validate(example["value"]) == {}
