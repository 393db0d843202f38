"""Every resource of a host over HTTP, on the seed's host: GPUs of the stub, models under a small real runner."""

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
import pytest

from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import DRIVER_NOT_LOADED, NOT_SUPPORTED, Card, Held
from tests.rig import until

V1 = "/api/v1"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UP_S = 60


@pytest.fixture
def process() -> "Iterator[subprocess.Popen[bytes]]":
    """A process that would run for ever."""
    child = subprocess.Popen(["sleep", "600"])
    yield child
    child.kill()
    child.wait()


def order(client, call, model="MAM", gpu_id=0, **more):
    return client.post(f"{V1}/models/{call}", json={"model_name": model, "gpu_id": gpu_id, **more})


def statuses(client, model="MAM"):
    return {item["gpu_id"]: item["status"] for item in client.get(f"{V1}/models/status/{model}").json}


def started(client, model="MAM", gpu_id=0, status="RUNNING"):
    assert order(client, "start", model, gpu_id).status_code == 202
    until(lambda: statuses(client, model)[gpu_id] == status, UP_S)


def audited(tmp_path):
    return [json.loads(line) for line in (tmp_path / "data" / "audit.log").read_text().splitlines()]


def test_the_welcome_is_the_seeds(client):
    assert client.get("/").json == {"status": "ok", "message": "Welcome to the Model Inference Client API"}


def test_gpus_are_the_seeds_and_more(client, nvml, process):
    nvml.write([Card(used_mib=11_183)], [Held(process.pid, 4096)])

    answer = client.get(f"{V1}/gpus")

    assert answer.status_code == 200
    [gpu] = answer.json
    began = datetime.fromtimestamp(psutil.Process(process.pid).create_time(), UTC).isoformat(timespec="milliseconds")
    assert gpu == {
        "id": 0,
        "memory_usage": 45.5,
        "power_draw": 150.7,
        "processes": [
            {
                "pid": process.pid,
                "name": "sleep",
                "gpu_memory_usage": 4096,
                "started_at": began.replace("+00:00", "Z"),
            }
        ],
        "name": "NVIDIA GeForce RTX 4090",
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
        "memory_total": 24_576,
        "memory_used": 11_183,
        "utilization": 37,
        "temperature": 61,
        "error": None,
    }


def test_what_a_card_does_not_report_is_null(client, nvml):
    nvml.write([Card()], fail={"nvmlDeviceGetPowerUsage": NOT_SUPPORTED})

    assert client.get(f"{V1}/gpus").json[0]["power_draw"] is None


def test_without_a_driver_gpus_are_not_implemented(client, nvml):
    nvml.write(fail={"nvmlInitWithFlags": DRIVER_NOT_LOADED, "nvmlDeviceGetCount_v2": DRIVER_NOT_LOADED})

    answer = client.get(f"{V1}/gpus")

    assert (answer.status_code, list(answer.json)) == (501, ["detail"])


def test_a_model_starts_in_the_background_and_stops_at_once(client, tmp_path):
    gate = seed_host.hold_starts(tmp_path / "data", "MAM")
    answer = order(client, "start", config={})

    assert answer.status_code == 202
    assert TIME.fullmatch(answer.json["created_at"])
    assert TIME.fullmatch(answer.json["updated_at"])
    # pid and port are those of a server that may not be there yet.
    assert answer.json == {
        **answer.json,
        "model_name": "MAM",
        "model_type": "triton",
        "active_gpu_ids": [0],
        "total_instances": 8,
        "status": "STARTING",
        "gpu_id": 0,
        "reason": None,
    }
    assert {"pid", "port"} < answer.json.keys()
    assert statuses(client) == {0: "STARTING"}

    gate.unlink()
    until(lambda: statuses(client) == {0: "RUNNING"}, UP_S)

    answer = order(client, "stop")
    assert answer.status_code == 200
    assert answer.json["status"] == "STOPPED"
    assert (answer.json["active_gpu_ids"], answer.json["total_instances"], answer.json["pid"]) == ([], 0, None)
    assert statuses(client) == {}
    assert order(client, "stop").status_code == 404


def test_a_second_gpu_and_a_second_model_are_counted(client):
    started(client)
    again = order(client, "start")
    second = order(client, "start", gpu_id=1)
    until(lambda: statuses(client) == {0: "RUNNING", 1: "RUNNING"}, UP_S)
    started(client, "FastFitAll", 1)

    assert (again.status_code, again.json["status"]) == (202, "RUNNING")
    assert (second.json["active_gpu_ids"], second.json["total_instances"]) == ([0, 1], 16)
    assert client.get(f"{V1}/models/status").json == [
        {"model_name": "MAM", "model_type": "triton", "gpu_id": 0, "status": "RUNNING"},
        {"model_name": "MAM", "model_type": "triton", "gpu_id": 1, "status": "RUNNING"},
        {"model_name": "FastFitAll", "model_type": "triton", "gpu_id": 1, "status": "RUNNING"},
    ]
    stopped = order(client, "stop").json
    assert (stopped["active_gpu_ids"], stopped["total_instances"], stopped["gpu_id"]) == ([1], 8, 0)


def test_an_instance_is_told_whole(client, nvml, tmp_path):
    started(client)
    pid = client.get(f"{V1}/models/instances").json[0]["pid"]
    nvml.write([Card(), Card()], [Held(pid, 3000)])

    [instance] = client.get(f"{V1}/models/instances").json

    assert TIME.fullmatch(instance.pop("since"))
    assert TIME.fullmatch(instance.pop("created_at"))
    assert instance == {
        "model_name": "MAM",
        "model_type": "triton",
        "gpu_id": 0,
        "gpu_ids": [0],
        "status": "RUNNING",
        "reason": None,
        "pid": pid,
        "port": seed_host.PORT,
        "gpu_memory_mib": 3000,
        "memory_gib": 4,
    }


def test_a_start_that_fails_is_an_error_with_reason_and_counts_no_more(client):
    started(client, "broken", status="ERROR")

    [instance] = client.get(f"{V1}/models/instances").json
    assert instance["reason"].startswith("Its weights are torn.")
    assert order(client, "stop", "broken").json["active_gpu_ids"] == []


def test_memory_that_is_not_there_is_refused_with_the_numbers_unless_forced(client, nvml):
    nvml.write([Card(used_mib=22_000), Card()])
    refused = order(client, "start")
    forced = order(client, "start", force=True)

    assert refused.status_code == 409
    assert "needs 4.0 GiB on GPU 0" in refused.json["detail"]
    assert forced.status_code == 202


def test_status_of_one_model_is_empty_or_not_found(client):
    assert client.get(f"{V1}/models/status/FastFitAll").json == []
    answer = client.get(f"{V1}/models/status/FastFit")
    assert answer.status_code == 404
    assert "Did you mean FastFitAll?" in answer.json["detail"]


def test_what_can_be_started_is_listed(client):
    assert client.get(f"{V1}/models/supported").json == [
        {"model_name": "MAM", "model_type": "triton", "instances_per_gpu": 8, "memory_gib": 4},
        {"model_name": "FastFitAll", "model_type": "triton", "instances_per_gpu": 1, "memory_gib": 2},
        {"model_name": "broken", "model_type": "triton", "instances_per_gpu": 1, "memory_gib": None},
    ]


def test_the_end_of_a_servers_log_can_be_had(client):
    started(client, gpu_id=1)

    answer = client.get(f"{V1}/models/MAM/logs?tail=2&gpu_id=1")

    assert answer.json == {"model_name": "MAM", "lines": ["MAM@1 says 1", "MAM@1 says 2"]}
    assert client.get(f"{V1}/models/MAMA/logs").status_code == 404


def test_a_process_is_ended_as_the_seed_has_it(client, nvml, process):
    nvml.write([Card()], [Held(process.pid)])
    [shown] = client.get(f"{V1}/gpus").json[0]["processes"]

    other = client.delete(f"{V1}/processes/{process.pid}?started_at=2024-01-01T00:00:00.000Z")
    answer = client.delete(f"{V1}/processes/{process.pid}?started_at={shown['started_at']}")

    assert other.status_code == 409
    assert (answer.status_code, answer.json) == (200, {"pid": process.pid, "status": "killed"})
    assert process.wait() == -15
    assert client.delete(f"{V1}/processes/{process.pid}").status_code == 404


def test_a_process_that_is_none_of_ours_is_refused(client, process):
    answer = client.delete(f"{V1}/processes/{process.pid}")

    assert answer.status_code == 403
    assert process.poll() is None


def test_every_change_is_in_the_audit_log(client, nvml, process, tmp_path):
    started(client)
    order(client, "stop")
    order(client, "stop")
    client.delete(f"{V1}/processes/1")

    events = audited(tmp_path)
    assert {(event["key"], event["address"]) for event in events} == {("local", "127.0.0.1")}
    assert [event["event"] for event in events] == ["model.start", "model.stop", "model.stop", "process.refused"]
    assert [event.get("outcome") for event in events[:3]] == ["done", "done", "MAM does not run on GPU 0."]
    assert (events[0]["model_name"], events[0]["gpu_id"], events[0]["force"]) == ("MAM", 0, False)


def test_an_error_that_nobody_foresaw_shows_no_traceback(make_app):
    app = make_app()

    @app.get("/fails")
    def fails() -> str:
        raise ZeroDivisionError("secret")

    fails.needs = None
    answer = app.test_client().get("/fails")

    assert answer.status_code == 500
    assert answer.json == {"detail": "The server failed; its log has the details."}


def test_the_documentation_comes_from_here_and_has_every_route(client):
    page = client.get("/docs")
    document = client.get("/openapi.json").json

    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) == 4
    assert [client.get(asset).status_code for asset in assets] == [200] * 4
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served = {
        (method, re.sub(r"<(\w+)>", r"{\1}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(("/docs", "/openapi"))
    }
    assert served <= described
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place = document
        for step in reference.split("/"):
            place = place[step]
