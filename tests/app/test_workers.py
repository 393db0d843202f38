"""The workers resource: who is shown what, and the orders to drain and resume."""

import json
import time

import pytest

from app.settings import Settings
from engines.catalogue import JobType
from tasks.fleet import Card, WorkerState
from tasks.ledger import Ledger
from tasks.settings import load_regions
from tests.conftest import Valkey

WORKERS = "/api/v1/workers"


@pytest.fixture
def show(worker):
    """Makes a worker beat once; the answer to its beat."""

    def show(name, worker_id=None, region="asia-east", types=(JobType.LLM,), lease_s=60.0, **fields):
        card = Card(
            worker_id=worker_id or f"{name}-1",
            name=name,
            region=region,
            host="host-7",
            device="cuda:0",
            models=dict.fromkeys(types, "echo"),
            slots=dict.fromkeys(types, 2),
            started_at=time.time(),
            **fields,
        )
        return worker.ledger.presence.beat(card.worker_id, card.encode(), [], name=name, lease_s=lease_s)

    return show


@pytest.fixture
def admin(client, make_key):
    """A client with an admin key: what it was answered."""
    headers = make_key("admin")

    def ask(path="", method="GET", status=200):
        answer = client.open(WORKERS + path, method=method, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json

    return ask


def lose(ledger: Ledger, worker_id: str) -> None:
    ledger.store.delete(f"lease:{worker_id}")
    ledger.store.zincrby("workers", -20, worker_id)
    ledger.orphans()


def test_an_admin_sees_everything_of_a_worker(admin, show):
    show(
        "gpu-7",
        types=(JobType.LLM, JobType.VISION),
        country="CN",
        city="Shanghai",
        gpu_name="NVIDIA GeForce RTX 4090",
        gpu_memory_gib=23.6,
        version="0.1.0",
        direct_url="https://gpu-7.example:8080",
        busy={JobType.LLM: 1},
    )

    (found,) = admin()["items"]

    assert all(found.pop(moment).endswith("Z") for moment in ("started_at", "last_beat"))
    assert found == {
        "worker_id": "gpu-7-1",
        "name": "gpu-7",
        "region": "asia-east",
        "country": "CN",
        "city": "Shanghai",
        "host": "host-7",
        "device": "cuda:0",
        "state": "ready",
        "drained": False,
        "types": ["llm", "vision"],
        "models": {"llm": "echo", "vision": "echo"},
        "gpu_name": "NVIDIA GeForce RTX 4090",
        "gpu_memory": 23.6,
        "slots": {"total": 4, "used": 1},
        "slots_by_type": {"llm": {"total": 2, "used": 1}, "vision": {"total": 2, "used": 0}},
        "reliability_score": 0.95,
        "version": "0.1.0",
        "direct_url": "https://gpu-7.example:8080",
    }
    assert admin("/gpu-7")["worker_id"] == admin("/gpu-7-1")["worker_id"] == "gpu-7-1"


@pytest.mark.parametrize("scope", ["infer", "read"])
def test_others_see_numbers_only(client, make_key, show, scope):
    show("one")
    show("two", region="europe-west", state=WorkerState.LOADING)

    answer = client.get(WORKERS, headers=make_key(scope))

    assert answer.json == {
        "total": 2,
        "by_region": {"asia-east": 1, "europe-west": 1},
        "by_type": {"llm": 2},
        "by_state": {"ready": 1, "loading": 1},
        "unreachable": [],
        "items": None,
    }
    assert client.get(f"{WORKERS}/one", headers=make_key(scope)).status_code == 403


def test_filters_by_region_type_and_state(admin, show):
    show("a", types=(JobType.VISION,))
    show("b", region="europe-west")
    show("c", state=WorkerState.OFF_DUTY)

    def names(query):
        return [item["name"] for item in admin(query)["items"]]

    assert names("?region=asia-east") == ["a", "c"]
    assert names("?type=llm") == ["c", "b"]
    assert names("?state=off_duty") == ["c"]
    assert names("?state=lost&region=asia-south") == []
    assert list(admin("?region=asia-eest", status=422)["errors"]) == ["region"]
    assert list(admin("?state=gone", status=422)["errors"]) == ["state"]


def test_a_lost_worker_is_shown_with_its_last_beat_and_a_lower_score(admin, show, worker):
    show("gpu-7", busy={JobType.LLM: 1})
    lose(worker.ledger, "gpu-7-1")

    found = admin("/gpu-7")

    assert (found["state"], found["slots"]["used"], found["reliability_score"]) == ("lost", 0, round(9.5 / 12, 4))
    assert admin()["by_state"] == {"lost": 1}


def test_drain_and_resume_are_orders_to_a_name_and_may_be_repeated(admin, show):
    show("gpu-7")

    for _ in range(2):
        assert admin("/gpu-7-1/drain", "POST", 202)["drained"] is True
    assert show("gpu-7").drained
    assert show("gpu-7", worker_id="gpu-7-2").drained  # started again
    assert not show("gpu-8").drained
    assert admin("/gpu-7")["worker_id"] == "gpu-7-2"

    for _ in range(2):
        assert admin("/gpu-7/resume", "POST", 202)["drained"] is False
    assert not show("gpu-7").drained


def test_an_order_is_pushed_to_the_worker(admin, show, worker):
    show("gpu-7")
    with worker.store.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe("ctl:gpu-7-1")
        admin("/gpu-7/drain", "POST", 202)
        admin("/gpu-7/resume", "POST", 202)

        said = []
        while len(said) < 2:
            message = heard.get_message(timeout=2)
            said += [message["data"]] if message else []

    assert said == ["drain", "resume"]


def test_the_order_of_a_worker_that_is_gone_can_be_taken_back(admin, show, worker):
    show("gpu-7")
    admin("/gpu-7/drain", "POST", 202)
    worker.ledger.presence.retire("gpu-7-1", name="gpu-7")
    assert admin("/gpu-7", status=404)["code"] == "worker_not_found"

    assert admin("/gpu-7/resume", "POST", 202) == {"name": "gpu-7", "drained": False}

    assert not show("gpu-7").drained
    worker.ledger.presence.retire("gpu-7-1", name="gpu-7")
    assert admin("/gpu-7/resume", "POST", 404)["code"] == "worker_not_found"
    assert admin("/gpu-7/drain", "POST", 404)["code"] == "worker_not_found"


def test_bootstrap_is_no_workers_name(app):
    adapter = app.url_map.bind("")

    assert adapter.match(f"{WORKERS}/bootstrap")[0] == "bootstrap.show"
    assert adapter.match(f"{WORKERS}/gpu-7")[0] == "workers.show"


def test_a_region_that_is_away_is_named_and_its_workers_are_not_called_unknown(
    make_app, valkey: Valkey, database_url, tmp_path, show
):
    regions = {
        "asia-east": {"broker": f"{valkey.url}/0", "store": f"{valkey.url}/1"},
        "europe-west": {"broker": f"{valkey.url}/0", "store": "redis://127.0.0.1:9/0"},
    }
    settings = Settings(
        database_url, str(tmp_path / "blobs"), load_regions({"REGIONS": json.dumps(regions)}), "asia-east", threads=8
    )
    client = make_app(settings).test_client()
    show("here")

    both = client.get(WORKERS)
    away = client.get(f"{WORKERS}?region=europe-west")
    there = client.post(f"{WORKERS}/there/drain")

    assert (both.status_code, both.json["total"], both.json["unreachable"]) == (200, 1, ["europe-west"])
    assert (away.status_code, away.json["code"]) == (503, "region_unavailable")
    assert (there.status_code, there.json["code"]) == (503, "region_unavailable")
    assert client.post(f"{WORKERS}/here/drain").status_code == 202
