"""The operator's commands."""

import hashlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask

JOBS = "/api/v1/jobs"


@pytest.fixture
def run(app: Flask):
    """Runs `flask --app wsgi ...` on the test's app."""
    runner = app.test_cli_runner()
    return lambda *words: runner.invoke(args=list(words))


def test_a_key_is_printed_once_and_opens_the_api(run, client):
    made = run("keys", "create", "alice", "--scope", "infer", "--scope", "read")

    key = made.stdout.strip()
    prefix, key_id, secret = key.split("_", 2)
    assert (prefix, len(key_id), len(secret)) == ("gpi", 8, 43)
    assert client.get(JOBS, headers={"X-API-Key": key}).status_code == 200
    listed = run("keys", "list").stdout
    assert key_id in listed
    assert "alice" in listed
    assert "infer,read" in listed
    assert secret not in listed


def test_the_database_holds_a_digest_and_no_secret(run, database_url):
    key = run("keys", "create", "alice", "--scope", "infer").stdout.strip()
    path = Path(database_url.removeprefix("sqlite:///"))

    files = b"".join(file.read_bytes() for file in path.parent.glob("jobs.db*"))
    assert key.split("_", 2)[2].encode() not in files
    digest = sqlite3.connect(path).execute("SELECT digest FROM api_keys").fetchone()[0]
    assert digest == hashlib.sha256(key.encode()).hexdigest()


def test_a_revoked_key_is_closed_at_once(run, client):
    key = run("keys", "create", "alice", "--scope", "read").stdout.strip()
    headers = {"X-API-Key": key}
    assert client.get(JOBS, headers=headers).status_code == 200

    assert run("keys", "revoke", key[4:12]).exit_code == 0

    answer = client.get(JOBS, headers=headers)
    assert (answer.status_code, answer.json["code"]) == (401, "key_refused")
    assert "revoked" in answer.json["detail"]
    assert "revoked" in run("keys", "list").stdout


def test_what_cannot_be_revoked_is_said(run):
    result = run("keys", "revoke", "00000000")

    assert result.exit_code != 0
    assert "no open key 00000000" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("create", "alice"),
        ("create", "alice", "--scope", "everything"),
        ("create", "", "--scope", "read"),
        ("create", "x" * 129, "--scope", "read"),
        ("create", "alice", "--scope", "read", "--expires-days", "0"),
    ],
)
def test_a_key_that_cannot_be_is_refused(run, words):
    assert run("keys", *words).exit_code == 2
    assert run("keys", "list").stdout == ""


def test_a_key_expires(run):
    run("keys", "create", "alice", "--scope", "read", "--expires-days", "7")

    assert "until" in run("keys", "list").stdout


def test_db_upgrade_makes_a_new_database_and_is_fine_twice(make_app, settings, tmp_path):
    app = make_app(replace(settings, database_url=f"sqlite:///{tmp_path}/new/folder/jobs.db"))
    runner = app.test_cli_runner()

    before = runner.invoke(args=["keys", "list"])
    upgrades = [runner.invoke(args=["db", "upgrade"]) for _ in range(2)]

    assert "db upgrade" in before.stderr
    assert [result.exit_code for result in upgrades] == [0, 0]
    assert runner.invoke(args=["keys", "list"]).exit_code == 0


def test_a_rotated_key_and_the_one_before_it_see_the_same_jobs_until_the_old_one_ends(run, client):
    old = run("keys", "create", "alice", "--scope", "infer", "--expires-days", "90").stdout.strip()
    job = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
    path = f"{JOBS}/{client.post(JOBS, json=job, headers={'X-API-Key': old}).json['job_id']}"

    new = run("keys", "rotate", old[4:12], "--overlap-hours", "1").stdout.strip()

    def looks() -> list[int]:
        return [client.get(path, headers={"X-API-Key": key}).status_code for key in (old, new)]

    assert looks() == [200, 200]
    rows = run("keys", "list").stdout.splitlines()
    assert [("alice" in row, "infer" in row, "until" in row) for row in rows] == [(True, True, True)] * 2
    assert f"owner {old[4:12]}" in rows[1]
    refused = run("keys", "rotate", new[4:12])
    assert (refused.exit_code, f"Key {old[4:12]} of the same owner is open too" in refused.stderr) == (1, True)
    run("keys", "revoke", old[4:12])
    assert looks() == [401, 200]
    third = run("keys", "rotate", new, "--overlap-hours", "0").stdout.strip()
    assert looks() == [401, 401]
    assert client.get(path, headers={"X-API-Key": third}).status_code == 200


def test_a_key_that_is_not_open_is_not_rotated(run):
    key = run("keys", "create", "alice", "--scope", "read").stdout.strip()
    run("keys", "revoke", key[4:12])

    for key_id in (key[4:12], "00000000"):
        result = run("keys", "rotate", key_id)
        assert (result.exit_code, f"no open key {key_id}" in result.stderr) == (1, True)
    assert len(run("keys", "list").stdout.splitlines()) == 1
