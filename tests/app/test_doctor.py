"""`flask --app wsgi doctor`, with parts that are well, frozen, old and missing."""

import json
from dataclasses import replace

import pytest

from app.settings import Settings
from app.tables import open_database

FAILED, WARNING, OK = "failed", "warning", "ok"


@pytest.fixture
def examine(make_app):
    """Runs the doctor on an app of these settings: its exit code, and the findings by what they are of."""

    def run(settings: Settings):
        done = make_app(settings).test_cli_runner().invoke(args=["doctor", "--json"])
        return done.exit_code, {finding["what"]: finding for finding in json.loads(done.stdout)}

    return run


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    """Whatever the machine that runs the tests is told to load."""
    for name in ("GPU_LLM_MODEL", "GPU_IMAGE_MODEL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def of(findings, what):
    """The one finding whose name begins like this."""
    (found,) = (finding for name, finding in findings.items() if name.startswith(what))
    return found


def test_what_is_well_is_said_in_a_line_each(app, valkey):
    done = app.test_cli_runner().invoke(args=["doctor"])

    lines = done.stdout.splitlines()
    assert done.exit_code == 0, done.stdout
    for what in ("python", "sql", "migrations", "store of", "broker of", "eviction of store", "blobs", "api keys"):
        assert any(line.startswith(f"ok       {what}") for line in lines), (what, done.stdout)


def test_a_frozen_store_is_found_in_time_and_the_rest_is_still_looked_at(examine, settings, valkey):
    valkey.stop()
    code, findings = examine(settings)

    assert code == 1
    for what in ("store of", "broker of"):
        assert of(findings, what)["verdict"] == FAILED
        assert "127.0.0.1" in of(findings, what)["advice"]
    assert findings["migrations"]["verdict"] == OK


def test_an_eviction_policy_that_loses_jobs_is_found(examine, settings, valkey):
    client = valkey.client()
    try:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        code, findings = examine(settings)
    finally:
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")

    assert (code, of(findings, "eviction of store")["verdict"]) == (1, FAILED)
    assert "noeviction" in of(findings, "eviction of store")["advice"]


def test_a_database_that_is_old_or_new_is_told_how_to_get_on(examine, settings, tmp_path):
    with open_database(settings.database_url).connect() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0003'")
    code, findings = examine(settings)

    assert (code, findings["migrations"]["verdict"]) == (1, FAILED)
    assert "db upgrade" in findings["migrations"]["advice"]


def test_no_disk_and_no_blob_store_are_found(examine, settings):
    # A file system that has no room and takes no files.
    code, findings = examine(replace(settings, blobs_url="/proc/blobs"))

    assert (code, findings["disk of blobs"]["verdict"], findings["blobs"]["verdict"]) == (1, FAILED, FAILED)
    assert "BLOBS_URL" in findings["blobs"]["advice"]


def test_a_password_is_in_no_line(make_app, settings, valkey):
    secret = "hunter2"
    url = f"redis://:{secret}@127.0.0.1:1/0"
    regions = {name: replace(region, broker=url, store=url) for name, region in settings.regions.items()}

    done = make_app(replace(settings, regions=regions)).test_cli_runner().invoke(args=["doctor"])

    assert done.exit_code == 1
    assert secret not in done.output


def test_an_open_address_and_a_gated_model_without_a_token_are_found(examine, settings, monkeypatch):
    monkeypatch.setenv("GPU_IMAGE_MODEL", "black-forest-labs/FLUX.1-dev")
    monkeypatch.setenv("GPU_LLM_MODEL", "no-such-model")
    at_commit = f"openai/whisper-base@{'a' * 40}"
    monkeypatch.setenv("GPU_WHISPER_MODEL", at_commit)

    code, findings = examine(replace(settings, host="0.0.0.0"))

    assert (code, findings["api keys"]["verdict"]) == (1, FAILED)
    assert "keys create" in findings["api keys"]["advice"]
    assert (findings["model of image_gen"]["verdict"], findings["model of llm"]["verdict"]) == (FAILED, FAILED)
    assert "HF_TOKEN" in findings["model of image_gen"]["advice"]
    assert (findings["model of whisper"]["verdict"], findings["model of whisper"]["found"]) == (OK, at_commit)
