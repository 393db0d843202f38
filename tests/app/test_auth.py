"""Who may do what: keys, scopes, and the rule for a server without keys."""

import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask

from app.auth import scopes_of
from app.keys import Scope

JOBS = "/api/v1/jobs"
HOOKS = "/api/v1/webhooks"
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}

#: Who may call what, by method and rule; `everybody` needs no key.
EVERYBODY = frozenset(Scope) | {"nobody"}
RIGHTS = {
    ("GET", "/"): EVERYBODY,
    ("GET", "/docs"): EVERYBODY,
    ("GET", "/docs/start.js"): EVERYBODY,
    ("GET", "/docs/<path:name>"): EVERYBODY,
    ("GET", "/openapi.json"): EVERYBODY,
    ("GET", "/health"): EVERYBODY,
    ("GET", "/ready"): EVERYBODY,
    ("POST", JOBS): {Scope.INFER, Scope.ADMIN},
    ("POST", f"{JOBS}/sync"): {Scope.INFER, Scope.ADMIN},
    ("GET", JOBS): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", f"{JOBS}/<job_id>"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("DELETE", f"{JOBS}/<job_id>"): {Scope.INFER, Scope.ADMIN},
    ("GET", "/api/v1/models"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/api/v1/workers"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/api/v1/workers/<worker>"): {Scope.ADMIN},
    ("POST", "/api/v1/workers/<worker>/drain"): {Scope.ADMIN},
    ("POST", "/api/v1/workers/<worker>/resume"): {Scope.ADMIN},
    ("GET", "/api/v1/workers/bootstrap"): {Scope.WORKER, Scope.ADMIN},
    ("GET", "/api/v1/keys"): {Scope.ADMIN},
    ("POST", "/api/v1/keys"): {Scope.ADMIN},
    ("PATCH", "/api/v1/keys/<key_id>"): {Scope.ADMIN},
    ("POST", "/api/v1/keys/<key_id>/rotate"): {Scope.ADMIN},
    ("DELETE", "/api/v1/keys/<key_id>"): {Scope.ADMIN},
    ("GET", "/api/v1/usage"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", f"{JOBS}/stats/queue"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", f"{JOBS}/direct/nearest"): {Scope.INFER, Scope.ADMIN},
    ("POST", f"{JOBS}/stream"): {Scope.INFER, Scope.ADMIN},
    ("GET", f"{JOBS}/<job_id>/events"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("POST", f"{JOBS}/<job_id>/retry"): {Scope.INFER, Scope.ADMIN},
    ("POST", HOOKS): {Scope.INFER, Scope.ADMIN},
    ("GET", HOOKS): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", f"{HOOKS}/<webhook_id>"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("PATCH", f"{HOOKS}/<webhook_id>"): {Scope.INFER, Scope.ADMIN},
    ("DELETE", f"{HOOKS}/<webhook_id>"): {Scope.INFER, Scope.ADMIN},
    ("GET", f"{HOOKS}/<webhook_id>/deliveries"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("POST", f"{HOOKS}/<webhook_id>/deliveries/<delivery_id>/replay"): {Scope.INFER, Scope.ADMIN},
    ("POST", f"{HOOKS}/<webhook_id>/rotate-secret"): {Scope.INFER, Scope.ADMIN},
    ("POST", f"{HOOKS}/<webhook_id>/test"): {Scope.INFER, Scope.ADMIN},
    ("GET", "/console"): EVERYBODY,
    ("GET", "/console/"): EVERYBODY,
    ("GET", "/console/<path:name>"): EVERYBODY,
    ("GET", "/api/v1/console/session"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/api/v1/console/events"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/api/v1/console/history"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/metrics"): {Scope.READ, Scope.ADMIN},
    ("GET", "/v1/models"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("GET", "/v1/models/<path:model>"): {Scope.INFER, Scope.READ, Scope.ADMIN},
    ("POST", "/v1/chat/completions"): {Scope.INFER, Scope.ADMIN},
    ("POST", "/v1/completions"): {Scope.INFER, Scope.ADMIN},
    ("POST", "/v1/embeddings"): {Scope.INFER, Scope.ADMIN},
    ("POST", "/v1/images/generations"): {Scope.INFER, Scope.ADMIN},
    ("POST", "/v1/audio/transcriptions"): {Scope.INFER, Scope.ADMIN},
    ("POST", "/v1/audio/translations"): {Scope.INFER, Scope.ADMIN},
}


def routes(app: Flask) -> set[tuple[str, str]]:
    """Every method of every rule, but those that Flask answers itself."""
    return {(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods - {"HEAD", "OPTIONS"}}


def test_every_route_states_its_scopes_and_stands_in_the_matrix(app):
    with app.app_context():
        silent = [rule.rule for rule in app.url_map.iter_rules() if scopes_of(rule.endpoint) is None]

    assert silent == []
    assert routes(app) == set(RIGHTS)


@pytest.mark.parametrize("who", [*Scope, "nobody", "wrong", "malformed", "expired", "revoked"])
def test_each_route_serves_exactly_those_with_a_right(app, make_key, who):
    make_key("infer")  # one key exists, so that all need one
    client = app.test_client()
    headers = _headers(app, make_key, who)
    failed = []
    for (method, rule), allowed in RIGHTS.items():
        path = rule.replace("<job_id>", str(uuid.uuid4())).replace("<path:name>", "swagger-ui.css")
        # The console has no such file, and says 404.
        path = re.sub("<[^>]+>", "any", path)
        path += "?timeout=0.01" if rule.endswith("sync") else ""
        answer = client.open(path, method=method, json=CHAT if method == "POST" else None, headers=headers)
        if who in allowed or allowed is EVERYBODY:
            right = answer.status_code not in (401, 403)
        elif who in frozenset(Scope):
            right = (answer.status_code, _code(answer)) == (403, "scope_missing")
        else:
            code = "key_required" if who == "nobody" else "key_refused"
            # OpenAI's one code for both.
            code = "invalid_api_key" if rule.startswith("/v1/") else code
            right = (answer.status_code, _code(answer)) == (401, code)
            right = right and answer.headers["WWW-Authenticate"] == "Bearer"
        if not right:
            failed.append((method, rule, answer.status_code))

    assert failed == []


def _code(answer: Any) -> str:
    """Of a problem, or of an error in OpenAI's shape."""
    return answer.json["error"]["code"] if "error" in answer.json else answer.json["code"]


def test_a_view_that_states_no_scope_is_closed(app):
    app.add_url_rule("/forgotten", view_func=lambda: "open")

    assert app.test_client().get("/forgotten").status_code == 403


def test_a_key_works_in_either_header(client, make_key):
    key = make_key("read")["X-API-Key"]

    assert client.get(JOBS, headers={"X-API-Key": key}).status_code == 200
    assert client.get(JOBS, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert client.get(JOBS, headers={"Authorization": f"bearer {key}"}).status_code == 200
    assert client.get(JOBS, headers={"Authorization": f"Basic {key}"}).status_code == 401


def test_a_refused_key_is_never_named_in_the_answer(client, make_key):
    key = make_key("read")["X-API-Key"]
    answer = client.get(JOBS, headers={"X-API-Key": key[:-1] + ("a" if key[-1] != "a" else "b")})

    assert answer.status_code == 401
    assert key[13:-1] not in answer.text


def test_jobs_of_the_time_without_keys_are_not_found_with_one(client, make_key):
    job_id = client.post(JOBS, json=CHAT).json["job_id"]
    headers = make_key("infer")
    client.application.extensions["keys"]._asked_at = float("-inf")  # as a second later

    assert client.get(f"{JOBS}/{job_id}", headers=headers).status_code == 404


# Without any key


def test_without_keys_a_program_on_this_host_is_served(client):
    assert client.get(JOBS).status_code == 200
    assert client.get(JOBS, headers={"Host": "[::1]:8000"}, environ_base={"REMOTE_ADDR": "::1"}).status_code == 200


def test_without_keys_a_key_that_is_sent_anyway_does_no_harm(client):
    assert client.get(JOBS, headers={"Authorization": "Bearer none"}).status_code == 200


@pytest.mark.parametrize(
    ("remote", "headers"),
    [
        ("192.168.1.7", {}),
        ("127.0.0.1", {"X-Forwarded-For": "192.168.1.7"}),
        ("127.0.0.1", {"Forwarded": "for=192.168.1.7"}),
        ("127.0.0.1", {"Host": "rebound.example:8000"}),
        ("127.0.0.1", {"Origin": "https://elsewhere.example"}),
        ("127.0.0.1", {"Origin": "null"}),
        ("", {}),
    ],
)
def test_without_keys_nobody_else_is_served(client, remote, headers):
    answer = client.get(JOBS, headers=headers, environ_base={"REMOTE_ADDR": remote})

    assert (answer.status_code, answer.json["code"]) == (401, "key_required")
    assert "keys create" in answer.json["detail"]


def test_without_keys_health_is_served_to_everybody(client):
    assert client.get("/health", environ_base={"REMOTE_ADDR": "192.168.1.7"}).status_code == 200


def test_an_operator_may_serve_everybody_without_keys(make_app, settings):
    client = make_app(replace(settings, allow_anonymous=True)).test_client()

    assert client.get(JOBS, environ_base={"REMOTE_ADDR": "192.168.1.7"}).status_code == 200


def test_to_revoke_the_last_key_opens_nothing(make_app, settings, app, make_key):
    key = make_key("infer")["X-API-Key"]
    app.extensions["keys"].revoke(key[4:12])

    answer = make_app(settings).test_client().get(JOBS)

    assert (answer.status_code, answer.json["code"]) == (401, "key_required")


def _headers(app: Flask, make_key: Callable[..., dict[str, str]], who: str) -> dict[str, str]:
    match who:
        case "nobody":
            return {}
        case "wrong":
            return {"X-API-Key": f"gpi_00000000_{'x' * 43}"}
        case "malformed":
            return {"X-API-Key": "secret"}
        case "expired":
            return make_key("admin", expires_days=-1)
        case "revoked":
            headers = make_key("admin")
            app.extensions["keys"].revoke(headers["X-API-Key"][4:12])
            return headers
        case _:
            return make_key(who)
