"""Liveness needs nothing; readiness says what is wrong, soon."""

import sqlite3
import time
from dataclasses import replace

from tasks.settings import load_regions
from tests.rig import BUSY_S, free_port, until


def test_health_answers_without_any_dependency(client, valkey, database_url):
    valkey.stop()
    sqlite3.connect(database_url.removeprefix("sqlite:///")).execute("BEGIN EXCLUSIVE")

    took = []
    for _ in range(3):
        began = time.monotonic()
        answer = client.get("/health")
        took.append(time.monotonic() - began)

    # Less than anything that it does not wait for would take to be given up.
    assert min(took) < 0.6
    assert (answer.status_code, answer.json) == (200, {"status": "ok"})


def test_ready_names_every_part(client, settings):
    # A busy machine may take longer for the first answer than a check may.
    until(lambda: client.get("/ready").status_code == 200)
    answer = client.get("/ready")

    assert answer.json == {"status": "ready", "database": "ok", "regions": dict.fromkeys(settings.regions, "ok")}


def test_a_store_that_is_down_makes_unready(client, valkey):
    valkey.kill()
    began = time.monotonic()
    answer = client.get("/ready")

    assert time.monotonic() - began < 2 + BUSY_S
    assert (answer.status_code, answer.json["status"]) == (503, "unready")
    assert answer.json["database"] == "ok"
    assert "ok" not in answer.json["regions"].values()


def test_a_store_that_is_frozen_makes_unready_within_two_seconds(client, valkey):
    client.get("/ready")
    valkey.stop()
    for _ in range(3):
        began = time.monotonic()
        answer = client.get("/ready")
        assert time.monotonic() - began < 2 + BUSY_S
        assert (answer.status_code, answer.json["status"]) == (503, "unready")


def test_one_region_away_is_degraded_and_named(make_app, settings):
    away = f"redis://127.0.0.1:{free_port()}"
    far = load_regions({"GPU_STORE_URL": f"{away}/1", "GPU_BROKER_URL": f"{away}/0"})["europe-west"]
    app = make_app(replace(settings, regions={**settings.regions, "europe-west": far}))

    answer = app.test_client().get("/ready")

    assert (answer.status_code, answer.json["status"]) == (200, "degraded")
    assert [name for name, state in answer.json["regions"].items() if state != "ok"] == ["europe-west"]


def test_a_database_without_migrations_makes_unready_and_says_what_to_do(make_app, settings, tmp_path):
    app = make_app(replace(settings, database_url=f"sqlite:///{tmp_path}/empty.db"))
    answer = app.test_client().get("/ready")

    assert answer.status_code == 503
    assert "db upgrade" in answer.json["database"]


def test_a_database_that_cannot_be_opened_makes_unready(make_app, settings, tmp_path):
    (tmp_path / "junk.db").write_bytes(b"no database" * 1000)
    app = make_app(replace(settings, database_url=f"sqlite:///{tmp_path}/junk.db"))
    answer = app.test_client().get("/ready")

    assert (answer.status_code, answer.json["status"]) == (503, "unready")
    assert app.test_client().get("/health").status_code == 200
