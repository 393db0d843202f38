"""The admin API of this host inside the main one: the same resources, the main API's keys and errors."""

import json
from dataclasses import replace

import pytest

from app import hosts
from app.auth import scopes_of
from app.settings import Settings
from tasks.settings import SettingsError
from tests.gpu_admin import seed_host
from tests.rig import until

HOST = "/api/v1/hosts/local"
ORDER = {"model_name": "MAM", "gpu_id": 0}


@pytest.fixture
def mounted(make_app, settings, tmp_path, monkeypatch):
    """The main API with the seed's host in it, on a machine without GPUs."""
    for name, value in seed_host.environ(tmp_path, 6004).items():
        monkeypatch.setenv(name, value)
    app = make_app(replace(settings, gpu_admin_mount=True))
    yield app
    app.extensions["gpu_admin"].host.instances.close()
    seed_host.end_servers(tmp_path / "data")


def test_by_itself_the_api_has_no_host(client, app):
    assert not Settings.from_environ({}).gpu_admin_mount
    assert client.get(f"{HOST}/models/status").status_code == 404
    assert "gpu_admin" not in app.extensions


def test_a_model_starts_and_stops_there(mounted):
    client = mounted.test_client()
    begun = client.post(f"{HOST}/models/start", json=ORDER)

    assert (begun.status_code, begun.json["total_instances"]) == (202, 8)
    until(lambda: [item["status"] for item in client.get(f"{HOST}/models/status").json] == ["RUNNING"])
    assert client.post(f"{HOST}/models/stop", json=ORDER).json["status"] == "STOPPED"


def test_it_needs_a_key_of_scope_admin_and_refusals_are_audited(mounted, tmp_path):
    from app.keys import Keys, Scope

    keys: Keys = mounted.extensions["keys"]
    admin, infer = keys.create("ops", [Scope.ADMIN]), keys.create("client", [Scope.INFER])
    client = mounted.test_client()

    def order(**headers):
        return client.post(f"{HOST}/models/start", json=ORDER, headers=headers)

    assert (order().status_code, order().json["code"]) == (401, "key_required")
    assert order(**{"X-API-Key": infer}).status_code == 403
    assert client.get(f"{HOST}/models/status", headers={"X-API-Key": infer}).status_code == 403
    assert order(**{"X-API-Key": admin}).status_code == 202
    events = [json.loads(line) for line in (tmp_path / "data" / "audit.log").read_text().splitlines()]
    assert [(event["event"], event["key"]) for event in events] == [
        ("request.refused", "nobody"),
        ("request.refused", "nobody"),
        ("request.refused", infer[4:12]),
        ("model.start", admin[4:12]),
    ]


def test_every_view_of_it_states_its_scope(mounted):
    with mounted.app_context():
        rules = [rule for rule in mounted.url_map.iter_rules() if rule.rule.startswith(hosts.PREFIX)]
        assert len(rules) == 9
        assert {scopes_of(rule.endpoint) for rule in rules} == {frozenset({"admin"})}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "models/start", {"model_name": "MAMM", "gpu_id": 0}, 400, "bad_request"),
        ("POST", "models/start", {"gpu_id": "0"}, 400, "bad_request"),
        ("POST", "models/stop", ORDER, 404, "not_found"),
        ("DELETE", "processes/1", None, 403, "forbidden"),
        ("GET", "models/nothing/logs", None, 404, "not_found"),
    ],
)
def test_its_errors_are_the_main_apis(mounted, method, path, body, status, code):
    answer = mounted.test_client().open(f"{HOST}/{path}", method=method, json=body)

    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert answer.json["code"] == code
    assert answer.json["detail"]


def test_the_document_has_it(mounted):
    document = mounted.test_client().get("/openapi.json").json

    assert "ModelInstanceInfo" in json.dumps(document["paths"][f"{HOST}/models/start"])
    for reference in {part.split('"')[0] for part in json.dumps(document).split('"$ref": "#/')[1:]}:
        place = document
        for step in reference.split("/"):
            place = place[step]


def test_a_wrong_setting_of_the_host_keeps_the_api_from_starting(make_app, settings, monkeypatch):
    monkeypatch.setenv("GPU_ADMIN_PORT", "none")

    with pytest.raises(SettingsError, match="GPU_ADMIN_PORT"):
        make_app(replace(settings, gpu_admin_mount=True))
