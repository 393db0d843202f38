"""Who may do what: keys, their scopes, their file, and the rule for a host without keys."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from gpu_admin.keys import Keys, NameTaken, Scope, main
from tests.rig import ROOT

V1 = "/api/v1"
ORDER = {"model_name": "MAM", "gpu_id": 0}
READ, ADMIN = Scope
EVERYBODY = {READ, ADMIN, None}

#: Who may call what; None has no key.
RIGHTS = {
    ("GET", "/"): EVERYBODY,
    ("GET", "/docs"): EVERYBODY,
    ("GET", "/docs/start.js"): EVERYBODY,
    ("GET", "/docs/<path:name>"): EVERYBODY,
    ("GET", "/openapi.json"): EVERYBODY,
    ("GET", f"{V1}/gpus"): {READ, ADMIN},
    ("GET", f"{V1}/models/status"): {READ, ADMIN},
    ("GET", f"{V1}/models/status/<model_name>"): {READ, ADMIN},
    ("GET", f"{V1}/models/supported"): {READ, ADMIN},
    ("GET", f"{V1}/models/instances"): {READ, ADMIN},
    ("GET", f"{V1}/models/<model_name>/logs"): {ADMIN},
    ("POST", f"{V1}/models/start"): {ADMIN},
    ("POST", f"{V1}/models/stop"): {ADMIN},
    ("DELETE", f"{V1}/processes/<pid>"): {ADMIN},
}


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "data")


def test_each_route_serves_exactly_those_with_a_right(client, keys):
    rules = {(method, rule.rule) for rule in client.application.url_map.iter_rules() for method in rule.methods}
    assert {rule for rule in rules if rule[0] not in ("HEAD", "OPTIONS")} == set(RIGHTS)

    texts = {scope: keys.create(f"a {scope}", scope) for scope in Scope}
    for (method, rule), allowed in RIGHTS.items():
        path = rule.replace("<model_name>", "MAM").replace("<pid>", "1").replace("<path:name>", "swagger-ui.css")
        for who in EVERYBODY:
            headers = {"X-API-Key": texts[who]} if who else {}
            answer = client.open(path, method=method, headers=headers, json={} if method == "POST" else None)
            # Process 1 is refused to everybody, in other words.
            let_in = answer.status_code not in (401, 403) or "Process 1" in answer.json["detail"]
            assert let_in == (who in allowed), (method, rule, who, answer.status_code)
            if not let_in:
                assert answer.status_code == (403 if who else 401)
                assert ("WWW-Authenticate" in answer.headers) == (who is None)
                assert list(answer.json) == ["detail"]


def test_a_key_works_in_either_header(client, keys):
    key = keys.create("monitoring", READ)

    def ask(**headers):
        return client.get(f"{V1}/gpus", headers=headers).status_code

    assert ask(**{"X-API-Key": key}) == ask(Authorization=f"Bearer {key}") == ask(Authorization=f"bearer {key}") == 200
    assert ask(Authorization=f"Basic {key}") == ask(**{"X-API-Key": key[:-1]}) == ask(**{"X-API-Key": "ключ"}) == 401


def test_keys_count_from_the_moment_they_are_made_or_revoked(client, keys):
    assert client.get(f"{V1}/gpus").status_code == 200
    key = keys.create("ops", ADMIN)
    assert client.get(f"{V1}/gpus").status_code == 401
    assert client.get(f"{V1}/gpus", headers={"X-API-Key": key}).status_code == 200

    keys.revoke("ops")

    assert client.get(f"{V1}/gpus", headers={"X-API-Key": key}).status_code == 401
    # To revoke the last one opens nothing.
    assert client.get(f"{V1}/gpus").status_code == 401


def test_a_view_that_states_no_scope_is_closed(make_app):
    app = make_app()
    app.add_url_rule("/forgotten", view_func=lambda: "open")

    assert app.test_client().get("/forgotten").status_code == 403


def test_refused_changes_are_in_the_audit_log_with_the_key_that_was_not_enough(client, keys, tmp_path):
    headers = {"X-API-Key": keys.create("monitoring", READ)}
    client.post(f"{V1}/models/start", json=ORDER, headers=headers)
    client.delete(f"{V1}/processes/1", environ_base={"REMOTE_ADDR": "192.168.1.7"})
    client.get(f"{V1}/gpus")

    events = [json.loads(line) for line in (tmp_path / "data" / "audit.log").read_text().splitlines()]
    assert [(event["event"], event["key"], event["address"], event["path"]) for event in events] == [
        ("request.refused", "monitoring", "127.0.0.1", f"{V1}/models/start"),
        ("request.refused", "nobody", "192.168.1.7", f"{V1}/processes/1"),
    ]


def test_a_keys_file_that_cannot_be_understood_lets_nobody_in(client, tmp_path):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "keys.json").write_text('[{"name": "ops"')

    answer = client.get(f"{V1}/gpus")

    assert (answer.status_code, list(answer.json)) == (503, ["detail"])
    assert client.get("/").status_code == 200


# Without any key


def test_without_keys_a_program_on_this_host_may_change_things(client):
    assert client.post(f"{V1}/models/start", json=ORDER).status_code == 202
    local = {"headers": {"Host": "[::1]:6004"}, "environ_base": {"REMOTE_ADDR": "::1"}}
    assert client.post(f"{V1}/models/start", json=ORDER, **local).status_code == 202


@pytest.mark.parametrize(
    ("remote", "headers"),
    [
        ("192.168.1.7", {}),
        ("127.0.0.1", {"X-Forwarded-For": "192.168.1.7"}),
        ("127.0.0.1", {"Host": "rebound.example:6004"}),
        ("127.0.0.1", {"Origin": "https://elsewhere.example"}),
        ("127.0.0.1", {"Origin": "http://localhost:3000"}),
        ("127.0.0.1", {"Origin": "null"}),
        ("", {}),
    ],
)
def test_without_keys_nobody_else_is_served(client, remote, headers):
    for call in (client.get, client.post):
        path = f"{V1}/gpus" if call == client.get else f"{V1}/models/start"
        answer = call(path, headers=headers, environ_base={"REMOTE_ADDR": remote})
        assert answer.status_code == 401
        assert "gpu_admin.keys create" in answer.json["detail"]


def test_an_operator_may_let_everybody_look_but_not_change(make_app):
    client = make_app(allow_anonymous=True).test_client()
    far = {"REMOTE_ADDR": "192.168.1.7"}

    assert client.get(f"{V1}/models/status", environ_base=far).status_code == 200
    assert client.post(f"{V1}/models/start", json=ORDER, environ_base=far).status_code == 403


# The file and its command


def test_the_file_is_its_owners_and_holds_no_key(keys, tmp_path):
    text = keys.create("ops", ADMIN)

    path = tmp_path / "data" / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert text.removeprefix("gpa_") not in path.read_text()
    with pytest.raises(NameTaken):
        keys.create("ops", READ)


def test_the_command_makes_lists_and_revokes(tmp_path, keys, monkeypatch):
    monkeypatch.setenv("GPU_ADMIN_DATA_DIR", str(tmp_path / "data"))

    def run(*words):
        return CliRunner().invoke(main, words)

    text = run("create", "ops", "--scope", "admin").stdout.strip()
    assert keys.find(text).scope is ADMIN
    assert run("revoke", "ops").exit_code == 0
    assert keys.find(text) is None
    assert "revoked" in run("list").stdout
    assert run("revoke", "ops").exit_code == 1


def test_what_the_command_cannot_do_is_told_on_one_line(tmp_path, keys):
    keys.create("ops", ADMIN)
    command = [sys.executable, "-m", "gpu_admin.keys", "create", "ops", "--scope", "read"]
    environ = {"GPU_ADMIN_DATA_DIR": str(tmp_path / "data")}

    said = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)

    assert (said.returncode, len(said.stderr.splitlines())) == (1, 1)
