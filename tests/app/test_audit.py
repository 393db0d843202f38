"""The audit log: what is written down beyond the calls of admins, what is not, and how it is shown."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network

import pytest
from flask import Flask
from sqlalchemy import text

from app.audit import ALL_REFUSALS, REFUSALS, Audit
from tests.app.conftest import CHAT

JOBS = "/api/v1/jobs"
DRAIN = "/api/v1/workers/none-such/drain"


@pytest.fixture
def log(app: Flask) -> Audit:
    """The app's audit log."""
    found: Audit = app.extensions["audit"]
    return found


@pytest.fixture
def run(app: Flask) -> Callable[..., str]:
    """Runs `flask --app wsgi ...` on the test's app; what it prints."""

    def invoke(*words: str) -> str:
        result = app.test_cli_runner().invoke(args=list(words))
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_looks_at_and_cancels_of_other_owners_jobs_are_written_down_and_one_s_own_are_not(client, make_key, log):
    owner, admin = make_key("infer"), make_key("admin")
    owner_id, admin_id = owner["X-API-Key"][4:12], admin["X-API-Key"][4:12]
    path = f"{JOBS}/{client.post(JOBS, json=CHAT, headers=owner).json['job_id']}"
    own = f"{JOBS}/{client.post(JOBS, json=CHAT, headers=admin).json['job_id']}"

    for headers in (owner, admin):
        for method in ("GET", "GET", "DELETE"):
            client.open(path, method=method, headers=headers)
        client.get(JOBS, headers=headers)
    client.get(own, headers=admin)

    # The second look within ten minutes is no news.
    assert [(row.actor, row.action, row.target, row.result) for row in log.newest()] == [
        (admin_id, "jobs.show", f"{path} of {owner_id}", "200"),
        (admin_id, "jobs.cancel", f"{path} of {owner_id}", "200"),
        (admin_id, "jobs.index", f"{JOBS} of {owner_id} and others", "200"),
    ]


def test_changes_of_keys_are_written_down_without_their_secrets(run, log):
    first = run("keys", "create", "alice", "--scope", "infer").strip()
    second = run("keys", "rotate", first[4:12]).strip()
    run("keys", "revoke", first)

    rows = log.newest()

    assert [(row.action, row.target) for row in rows] == [
        ("keys.create", first[4:12]),
        ("keys.rotate", f"{first[4:12]} to {second[4:12]}"),
        ("keys.revoke", first[4:12]),
    ]
    assert all((row.actor or "").startswith("cli:") and row.address is None for row in rows)


def test_a_refused_order_names_the_key_where_it_was_right_once(app, client, make_key, log):
    revoked = make_key("admin")
    app.extensions["keys"].revoke(revoked["X-API-Key"][4:12])

    client.post(DRAIN, headers=revoked)
    client.post(DRAIN, headers={"X-API-Key": f"{revoked['X-API-Key'][:-1]}!"})

    assert [(row.actor, row.result) for row in log.newest()] == [
        (revoked["X-API-Key"][4:12], "401 key_refused"),
        (None, "401 key_refused"),
    ]


def test_the_address_is_the_client_s_own_behind_a_trusted_proxy_alone(make_app, settings, make_key):
    client = make_app(replace(settings, trusted_proxies=[ip_network("10.9.0.0/24")])).test_client()
    headers = {**make_key("admin"), "X-Forwarded-For": "198.51.100.7"}

    for peer in ("10.9.0.1", "10.8.0.1"):
        client.post(DRAIN, headers=headers, environ_base={"REMOTE_ADDR": peer})

    assert [row.address for row in client.application.extensions["audit"].newest()] == ["198.51.100.7", "10.8.0.1"]


def test_refusals_fill_no_table(client, make_key, log):
    make_key("infer")

    def knock(address: str) -> None:
        for _ in range(REFUSALS.amount + 1):
            assert client.post(DRAIN, environ_base={"REMOTE_ADDR": address}).status_code == 401

    knock("192.0.2.1")
    assert len(log.newest(limit=1000)) == REFUSALS.amount
    for number in range(2, 13):
        knock(f"192.0.2.{number}")
    assert len(log.newest(limit=1000)) == ALL_REFUSALS.amount


def test_the_log_is_shown_with_filters_in_one_line_each_and_old_rows_are_removed_by_order(
    app, client, make_key, log, run
):
    admin = make_key("admin")
    client.post("/api/v1/workers/%0Aforged%20row%00/drain", headers=admin)
    client.post(DRAIN, headers=make_key("read"))
    with app.extensions["database"].connect() as connection:
        connection.execute(text("UPDATE audit SET at = at - 10 * 86400 WHERE id = 1"))

    lines = run("audit").splitlines()

    assert len(lines) == 2
    assert "/api/v1/workers/%0Aforged%20row%00/drain" in lines[0]
    assert "403 scope_missing" in lines[1]
    assert run("audit", "--actor", admin["X-API-Key"][4:12]).splitlines() == lines[:1]
    assert run("audit", "--hours", "1").splitlines() == run("audit", "--limit", "1").splitlines() == lines[1:]
    assert run("audit", "--action", "workers.").splitlines() == lines
    assert run("audit", "--action", "work%").splitlines() == []
    assert run("audit", "--prune-days", "5").startswith("1 rows")
    assert [row.action for row in log.newest()] == ["workers.drain", "audit.prune"]


def test_an_order_is_answered_though_it_cannot_be_written_down(app, client, make_key, log, caplog):
    headers = make_key("admin")
    with app.extensions["database"].connect() as connection:
        connection.execute(text("DROP TABLE audit"))

    assert client.post(DRAIN, headers=headers).status_code == 404

    assert "none-such" in caplog.text
    assert "audit log cannot be written" in caplog.text
