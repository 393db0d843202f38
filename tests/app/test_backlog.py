"""Jobs for a region that takes none are held up to a bound, and come out when it takes them again."""

import dataclasses
import uuid

import pytest

from app import backlog
from app.control import Reconciler
from tests.app.conftest import CHAT
from tests.rig import until

HELD = 3


@pytest.fixture
def settings(settings):
    """With a small bound."""
    return dataclasses.replace(settings, max_unsent=HELD)


def create(client, **headers):
    return client.post("/api/v1/jobs", json=CHAT, headers=headers)


@pytest.mark.parametrize("fault", ["stop", "kill"])
def test_jobs_are_held_up_to_the_bound_then_refused_with_the_reason(client, valkey, fault):
    getattr(valkey, fault)()

    answers = [create(client) for _ in range(HELD + 2)]

    assert [answer.status_code for answer in answers] == [202] * HELD + [503] * 2
    refused = answers[-1]
    assert refused.json["code"] == "too_many_unsent"
    assert refused.json["detail"].startswith("The store of asia-east does not answer. 3 jobs wait for it already")
    assert int(refused.headers["Retry-After"]) > 0
    assert len(client.get("/api/v1/jobs").json["items"]) == HELD


def test_at_the_bound_a_repeated_request_still_gets_its_job_and_a_sync_one_503_as_ever(client, valkey):
    valkey.kill()
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first, *_ = [create(client, **key) if n == 0 else create(client) for n in range(HELD)]

    again = create(client, **key)
    sync = client.post("/api/v1/jobs/sync", json=CHAT)

    assert (again.status_code, again.json["job_id"]) == (202, first.json["job_id"])
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (sync.status_code, sync.json["code"]) == (503, "region_unavailable")


def test_what_was_held_comes_out_when_the_store_is_back_and_there_is_room_again(app, client, valkey, worker):
    valkey.stop()
    held = {create(client).json["job_id"] for _ in range(HELD)}
    assert create(client).status_code == 503
    reconciler = Reconciler(app.extensions["dispatch"])
    reconciler.tick()

    valkey.cont()

    def sent() -> bool:
        reconciler.tick()
        return set(worker.waiting()) == held

    until(sent)
    assert create(client).status_code == 202


def test_processes_share_the_bound(make_app, settings, valkey, monkeypatch):
    monkeypatch.setattr(backlog, "COUNT_EVERY_S", 0.0)
    clients = [make_app(settings).test_client() for _ in range(2)]
    valkey.kill()

    answers = [create(clients[number % 2]).status_code for number in range(HELD + 2)]

    assert answers == [202] * HELD + [503] * 2
