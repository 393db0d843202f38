"""Every route of the API, as its table lists them: whom it lets in, whose jobs it shows, what it writes down."""

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from limits import RateLimitItemPerMinute
from werkzeug.routing import Rule

from app.audit import Audit
from app.auth import scopes_of
from app.keys import Keys, Scope
from app.settings import Settings
from tests.app.conftest import CHAT
from tests.gpu_admin import seed_host

JOBS = "/api/v1/jobs"
NO_KEY = "no key", "malformed", "unknown", "expired", "revoked"
CLIENTS = {Scope.INFER, Scope.READ}


@pytest.fixture(params=["alone", "with the host's admin API"])
def table_app(
    request: pytest.FixtureRequest,
    make_app: Callable[[Settings], Flask],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Flask]:
    """The API, and the API with GPU_ADMIN_MOUNT."""
    if request.param == "alone":
        yield make_app(settings)
        return
    for name, value in seed_host.environ(tmp_path, 6004).items():
        monkeypatch.setenv(name, value)
    app = make_app(replace(settings, gpu_admin_mount=True))
    yield app
    app.extensions["gpu_admin"].host.instances.close()


def callers(app: Flask) -> dict[str, dict[str, str]]:
    """Headers by who sends them: each scope, and those who have no right."""
    keys: Keys = app.extensions["keys"]
    texts = {str(scope): keys.create(scope, [scope]) for scope in Scope}
    texts |= {"malformed": "secret", "unknown": f"gpi_00000000_{'x' * 43}"}
    texts["expired"] = keys.create("expired", Scope, expires_days=-1)
    texts["revoked"] = keys.create("revoked", Scope)
    keys.revoke(texts["revoked"][4:12])
    return {"no key": {}} | {who: {"X-API-Key": text} for who, text in texts.items()}


def routes(app: Flask) -> Iterator[tuple[str, Rule, str]]:
    """Method, rule and a path of every route, but OPTIONS and HEAD, which Flask adds."""
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<job_id>", str(uuid.uuid4())).replace("<path:name>", "swagger-ui.css")
        path = re.sub("<[^>]+>", "none-such", path) + ("?timeout=0.01" if rule.rule.endswith("/sync") else "")
        for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
            yield method, rule, path


def call(client: FlaskClient, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and code of the answer."""
    body = CHAT if path.startswith(JOBS) else {}
    answer = client.open(path, method=method, headers=headers, json=body if method == "POST" else None)
    code = answer.json.get("code", "") if answer.status_code >= 400 and answer.is_json else ""
    if path.startswith("/v1/") and answer.status_code in (401, 403):
        # In OpenAI's shape and words; that no key was sent is told in the message alone.
        error = answer.json["error"]
        code = {"invalid_api_key": "key_refused" if headers else "key_required"}.get(error["code"], error["code"])
    answer.close()
    return answer.status_code, code


def test_every_route_lets_in_exactly_whom_its_scopes_name(table_app):
    headers, client = callers(table_app), table_app.test_client()
    wrong = []
    for method, rule, path in routes(table_app):
        with table_app.app_context():
            scopes = scopes_of(rule.endpoint)
        assert scopes is not None, f"{rule.endpoint} states no scope"
        for who, sent in headers.items():
            status, code = call(client, method, path, sent)
            if not scopes or who in scopes | {Scope.ADMIN}:
                right = status not in (401, 403)
            elif who in NO_KEY:
                right = (status, code) == (401, "key_required" if who == "no key" else "key_refused")
            else:
                right = (status, code) == (403, "scope_missing")
            if not right:
                wrong.append((method, path, who, status, code))

    assert wrong == []


def test_every_route_of_one_job_is_blind_for_other_owners(table_app):
    headers, client = callers(table_app), table_app.test_client()
    keys: Keys = table_app.extensions["keys"]
    owner = {"X-API-Key": keys.create("owner", [Scope.INFER])}
    job_id = client.post(JOBS, json=CHAT, headers=owner).json["job_id"]
    of_one = [(method, rule.rule) for method, rule, _ in routes(table_app) if "<job_id>" in rule.rule]

    assert {method for method, _ in of_one} == {"GET", "DELETE", "POST"}
    for method, rule in of_one:
        path = rule.replace("<job_id>", job_id)
        assert call(client, method, path, headers["infer"]) == (404, "job_not_found")
        assert call(client, method, path.upper().replace("/API/V1/JOBS", JOBS), headers["infer"])[0] == 404
        if method == "POST":
            continue
        assert call(client, "GET", path, headers["admin"])[0] == call(client, "GET", path, owner)[0] == 200
    assert client.get(JOBS, headers=headers["infer"]).json["items"] == []
    assert client.get(f"{JOBS}/{job_id}", headers=owner).json["status"] == "queued"


def test_every_route_that_is_not_for_clients_writes_one_row_into_the_audit_log(table_app, monkeypatch):
    # There are more such routes than refusals of one address that are written down in a minute.
    monkeypatch.setattr("app.audit.REFUSALS", RateLimitItemPerMinute(1000))
    headers, client = callers(table_app), table_app.test_client()
    log: Audit = table_app.extensions["audit"]
    for method, rule, path in routes(table_app):
        with table_app.app_context():
            scopes = scopes_of(rule.endpoint)
        for who in ("admin", "infer"):
            before = len(log.newest(limit=1000))
            status, _ = call(client, method, path, headers[who])
            added = log.newest(limit=1000)[before:]
            if not scopes or scopes & CLIENTS:
                # An admin's may be another owner's job.
                assert added == [] or who == "admin", rule
                continue
            assert [(row.action, row.target) for row in added] == [(rule.endpoint, path.partition("?")[0])], rule
            assert (added[0].actor, added[0].address) == (headers[who]["X-API-Key"][4:12], "127.0.0.1")
            assert added[0].result.startswith(f"{status}")
            assert (added[0].result == "403 scope_missing") == (who == "infer")
