"""What clients see of the queues: the statistics, and why a job waits."""

import time
from dataclasses import replace

import pytest

from app.links import FRESH_S
from engines.catalogue import JobType
from tasks.fleet import Card, WorkerState
from tests.app.conftest import CHAT

JOBS = "/api/v1/jobs"
STATS = f"{JOBS}/stats/queue"


def show(worker, region="asia-east", *, state=WorkerState.READY, slots=2, model="echo", name="w"):
    """Be alive for one lease, and be seen."""
    card = Card(name, name, region, "host", "cpu", {JobType.LLM: model}, {JobType.LLM: slots}, time.time())
    worker.ledger.presence.beat(name, replace(card, state=state).encode(), [])
    time.sleep(FRESH_S + 0.1)


def test_every_region_is_counted_by_itself(client, worker):
    begun = client.post(JOBS, json=CHAT).json["job_id"]
    client.post(JOBS, json=CHAT)
    client.post(JOBS, json={**CHAT, "region": "europe-west", "allow_cross_region": False})
    show(worker)
    worker.begin(begun)
    # As the reconciler does within a second.
    client.get(f"{JOBS}/{begun}")

    stats = client.get(STATS).json

    assert (stats["total_queued"], stats["running"], stats["available_workers"]) == (2, 1, 1)
    assert stats["by_type"]["llm"] == 2
    waits = {name: region.pop("oldest_wait_seconds") for name, region in stats["by_region"].items()}
    here = {"queued": 1, "running": 1, "available_workers": 1, "reachable": True}
    empty = {"queued": 0, "running": 0, "available_workers": 0, "reachable": True}
    assert stats["by_region"] == {
        "asia-east": here,
        "asia-south": empty,
        "europe-west": {**empty, "queued": 1},
        "america-north": empty,
    }
    assert waits["asia-south"] is None
    assert 1 <= waits["asia-east"] <= 10
    assert stats["oldest_wait_seconds"] >= waits["europe-west"] >= 1
    assert list(client.get(f"{STATS}?region=asia-east").json["by_region"]) == ["asia-east"]


def test_only_workers_that_take_jobs_are_available(client, worker):
    show(worker, state=WorkerState.DRAINING, name="going")
    assert client.get(STATS).json["available_workers"] == 0

    show(worker, name="staying")
    assert client.get(STATS).json["available_workers"] == 1


def test_a_wait_is_estimated_from_what_ran_and_from_what_runs(client, worker):
    show(worker, slots=1)
    assert client.get(STATS).json["estimated_wait_seconds"] == 0
    first = client.post(JOBS, json=CHAT).json
    assert (first["queue_position"], first["estimated_wait_seconds"]) == (1, 0)
    worker.begin(first["job_id"])

    second = client.post(JOBS, json=CHAT).json
    assert (second["queue_position"], second["estimated_wait_seconds"]) == (1, None)
    # It took half a second, the worker says.
    worker.finish(first["job_id"])
    worker.begin(second["job_id"])
    time.sleep(FRESH_S + 0.1)

    third = client.post(JOBS, json=CHAT).json
    fourth = client.post(JOBS, json={**CHAT, "model": "echo"}).json
    assert (third["queue_position"], third["estimated_wait_seconds"]) == (1, 1)
    # It waits behind the third, though in a queue of its own.
    assert fourth["queue_position"] == 2
    assert client.get(STATS).json["estimated_wait_seconds"] >= 1


@pytest.mark.parametrize(
    ("state", "changes", "reason"),
    [
        (None, {}, "No live worker serves llm in asia-east, nor in any other region."),
        (
            None,
            {"allow_cross_region": False},
            "No live worker serves llm in asia-east, and it may not leave the region.",
        ),
        (
            WorkerState.DRAINING,
            {},
            "The workers for llm in asia-east take no new jobs now (1 draining), and no other region has any.",
        ),
        (
            WorkerState.OFF_DUTY,
            {"allow_cross_region": False},
            "The workers for llm in asia-east take no new jobs now (1 off duty), and it may not leave the region.",
        ),
        (WorkerState.READY, {}, "A worker with a free slot takes it next; 0 jobs are before it."),
        (
            WorkerState.READY,
            {"model": "Qwen/Qwen2.5-7B-Instruct"},
            "No live worker serves llm with Qwen/Qwen2.5-7B-Instruct in asia-east, nor in any other region.",
        ),
    ],
    ids=["nobody", "nobody-pinned", "draining", "off-duty-pinned", "free", "no-model"],
)
def test_a_job_says_why_it_waits(client, worker, state, changes, reason):
    if state is not None:
        show(worker, state=state)
    job = client.post(JOBS, json={**CHAT, **changes}).json

    assert client.get(f"{JOBS}/{job['job_id']}").json["queued_reason"] == reason


def test_a_job_that_waits_for_a_busy_worker_or_is_about_to_move_says_so(client, worker):
    show(worker, slots=1)
    worker.begin(client.post(JOBS, json=CHAT).json["job_id"])
    job = client.post(JOBS, json=CHAT).json["job_id"]

    def reason():
        return client.get(f"{JOBS}/{job}").json["queued_reason"]

    assert reason() == "All 1 slots for llm in asia-east are busy; 0 jobs are before it."
    worker.ledger.presence.retire("w")
    show(worker, "europe-west", name="far")
    assert reason() == "No live worker serves llm in asia-east; it moves to europe-west within seconds."


def test_a_job_of_a_region_that_cannot_be_reached_says_whether_it_may_leave(client, valkey):
    may = client.post(JOBS, json=CHAT).json["job_id"]
    may_not = client.post(JOBS, json={**CHAT, "allow_cross_region": False}).json["job_id"]
    valkey.kill()

    assert client.get(f"{JOBS}/{may}").json["queued_reason"] == (
        "Region asia-east cannot be reached; the job is sent when it is back, or moves to another region that serves "
        "llm."
    )
    assert client.get(f"{JOBS}/{may_not}").json["queued_reason"] == (
        "Region asia-east cannot be reached, and the job may not leave it; it is sent when the region is back."
    )
