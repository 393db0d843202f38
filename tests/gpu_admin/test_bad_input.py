"""Whatever a client sends wrong is answered with 4xx, {"detail": ...} and the rule, and starts nothing."""

import json
import os

import pytest

from gpu_admin.parsing import MOST_BODY_BYTES

START = "/api/v1/models/start"
STOP = "/api/v1/models/stop"
GOOD = {"model_name": "MAM", "gpu_id": 0}


def assert_refused(answer, status, *words):
    assert (answer.status_code, list(answer.json)) == (status, ["detail"])
    assert len(answer.json["detail"]) < 500
    for word in words:
        assert word in answer.json["detail"]


@pytest.mark.parametrize("path", [START, STOP])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"gpu_id": 0}, ["model_name", "Missing"]),
        ({"model_name": "MAM"}, ["gpu_id", "Missing"]),
        ({**GOOD, "gpu_id": -1}, ["gpu_id"]),
        ({**GOOD, "gpu_id": "0"}, ["gpu_id: Must be an integer."]),
        ({**GOOD, "gpu_id": 0.0}, ["gpu_id: Must be an integer."]),
        ({**GOOD, "gpu_id": True}, ["gpu_id: Must be an integer."]),
        ({**GOOD, "gpu_id": None}, ["gpu_id"]),
        ({**GOOD, "gpu_id": 10**30}, ["gpu_id"]),
        ({**GOOD, "model_name": ["MAM"]}, ["model_name: Not a valid string."]),
        ({**GOOD, "model_name": ""}, ["model_name"]),
        ({**GOOD, "model_name": "x" * 60_000}, ["model_name"]),
        ({**GOOD, "gpu": 0}, ["gpu: Unknown field. Did you mean gpu_id?"]),
        ({**GOOD, "privileged": True}, ["privileged: Unknown field. Known: "]),
        ({**GOOD, "x" * 60_000: 1}, ["Unknown field."]),
        ({}, ["(1 more)"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_body_that_breaks_a_rule_is_told_which(client, path, body, words):
    assert_refused(client.post(path, json=body), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({**GOOD, "gpu_id": 2}, ["gpu_id: 2 is not there; this host has GPUs 0 to 1."]),
        ({**GOOD, "model_name": "MAMM"}, ["MAMM", "Did you mean MAM?"]),
        ({**GOOD, "model_name": "../MAM"}, ["../MAM"]),
        ({**GOOD, "model_name": "MAM\x00"}, ["MAM"]),
        ({**GOOD, "model_name": "\ud800"}, ["no model"]),
        ({**GOOD, "config": []}, ["config: Not a valid mapping type."]),
        ({**GOOD, "config": {"image": "evil"}}, ["config"]),
        ({**GOOD, "force": 1}, ["force: Must be true or false."]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_start_that_breaks_a_rule_is_told_which(client, body, words):
    assert_refused(client.post(START, data=json.dumps(body), content_type="application/json"), 400, *words)
    assert client.get("/api/v1/models/status").json == []


@pytest.mark.parametrize("name", ["MAMM", "../MAM"])
def test_a_stop_of_an_unknown_model_is_not_found(client, name):
    assert_refused(client.post(STOP, json={**GOOD, "model_name": name}), 404, name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"MAM"', "must be a JSON object"),
        (b'{"gpu_id": NaN}', "NaN is no JSON number"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"gpu_id": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"model_name": "MAM", "gpu_id": 0, "gpu_id": 1}', "two fields named 'gpu_id'"),
    ],
    ids=["empty", "cut", "list", "text", "nan", "utf-16", "deep", "digits", "twice"],
)
def test_a_body_that_is_no_json_object_is_refused(client, data, words):
    assert_refused(client.post(START, data=data, content_type="application/json"), 400, words)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_page_elsewhere_can_send_is_not_read(client, kind):
    assert_refused(client.post(START, data=json.dumps(GOOD), content_type=kind), 415, "application/json")
    assert client.get("/api/v1/models/status").json == []


def test_a_body_that_is_too_large_is_refused(client):
    assert_refused(client.post(START, json={**GOOD, "config": {"x": "y" * MOST_BODY_BYTES}}), 413, str(MOST_BODY_BYTES))


@pytest.mark.parametrize(
    ("pid", "status"),
    [
        ("abc", 400),
        ("1.5", 400),
        ("0", 400),
        ("-1", 400),
        ("٣", 400),
        ("9" * 5000, 400),
        ("99999999999", 400),
        ("1", 403),
        ("4194304", 404),
    ],
    ids=["word", "fraction", "0", "-1", "arabic", "digits", "beyond", "init", "gone"],
)
def test_a_pid_that_may_not_be_ended_is_refused(client, pid, status):
    assert_refused(client.delete(f"/api/v1/processes/{pid}"), status)


def test_the_service_does_not_end_itself(client):
    assert_refused(client.delete(f"/api/v1/processes/{os.getpid()}"), 403, "belongs to this service")


@pytest.mark.parametrize(
    "path",
    [
        "models/MAM/logs?tail=0",
        "models/MAM/logs?tail=x",
        "models/MAM/logs?tail=10001",
        "models/MAM/logs?gpu_id=-1",
        "models/MAM/logs?lines=5",
    ],
)
def test_a_query_that_breaks_a_rule_is_told_which(client, path):
    assert_refused(client.get(f"/api/v1/{path}"), 400, path.partition("?")[2].partition("=")[0])


def test_a_time_that_is_none_is_refused(client):
    assert_refused(client.delete("/api/v1/processes/1?started_at=yesterday"), 400, "started_at", "2024-01-01T00")


@pytest.mark.parametrize("name", ["%2e%2e", "..%2fMAM", "MAM%00", "x" * 3000])
def test_a_model_name_with_a_path_in_it_is_not_found(client, name):
    assert client.get(f"/api/v1/models/status/{name}").status_code == 404
    assert client.get(f"/api/v1/models/{name}/logs").status_code == 404


def test_unknown_paths_and_methods_are_told_so(client):
    assert_refused(client.get("/api/v1/nothing"), 404, "/api/v1/nothing", "/docs")
    answer = client.put("/api/v1/gpus")
    assert_refused(answer, 405, "PUT", "GET")
    assert "GET" in answer.headers["Allow"]
