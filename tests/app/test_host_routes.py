"""GPU hosts behind the main API: a real gpu_admin on another port, asked through a real API with keys."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app import gpu_hosts
from app.audit import Audit
from app.gpu_hosts import GpuHost
from app.keys import Keys, Scope
from app.settings import Settings
from gpu_admin import keys as admin_keys
from tasks.settings import SettingsError
from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import Card, Held, NvmlStub
from tests.gpu_admin.serving import served
from tests.rig import free_port, until

HOSTS = "/api/v1/hosts"
ORDER = {"model_name": "MAM", "gpu_id": 0}
CARD = Card("NVIDIA L40S", 46_068)


class Stranger(BaseHTTPRequestHandler):
    """A web server that is no gpu_admin: it redirects to whatever it is asked, or says a page."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(302 if "gpus" in self.path else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"hi")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuHost]:
    """A gpu_admin with a key, on a host with one GPU."""
    folder, port = tmp_path_factory.mktemp("host"), free_port()
    stub = NvmlStub(folder)
    stub.write([CARD], [Held(os.getpid(), 1024)])
    environ = {**os.environ, **stub.environ, **seed_host.environ(folder, port)}
    key = admin_keys.Keys(folder / "data").create("platform", admin_keys.Scope.ADMIN)
    with served(environ, port, folder):
        yield GpuHost("gpu-7", f"http://127.0.0.1:{port}", key)


@pytest.fixture(scope="module")
def stranger() -> Iterator[GpuHost]:
    Stranger.seen = []
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield GpuHost("stranger", f"http://127.0.0.1:{server.server_port}", "gpa_secret")
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def deaf() -> Iterator[GpuHost]:
    """It takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield GpuHost("deaf", f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.fixture
def fleet(
    make_app: Callable[[Settings], Flask], settings: Settings, host: GpuHost, stranger: GpuHost, deaf: GpuHost
) -> Flask:
    """An API with those hosts, one that is gone, and one whose key is wrong."""
    hosts = [host, stranger, deaf, GpuHost("gone", f"http://127.0.0.1:{free_port()}"), replace(host, name="locked")]
    hosts[-1] = replace(hosts[-1], key="gpa_wrong")
    return make_app(replace(settings, gpu_hosts={host.name: host for host in hosts}))


def test_a_model_runs_and_a_gpu_is_seen_on_another_host(fleet: Flask) -> None:
    client = fleet.test_client()

    (gpu,) = client.get(f"{HOSTS}/gpu-7/gpus").json
    assert (gpu["name"], gpu["processes"][0]["pid"]) == (CARD.name, os.getpid())
    begun = client.post(f"{HOSTS}/gpu-7/models/start", json=ORDER)
    assert (begun.status_code, begun.json["total_instances"]) == (202, 8)
    until(lambda: [item["status"] for item in client.get(f"{HOSTS}/gpu-7/models/instances").json] == ["RUNNING"], 30)
    log = client.get(f"{HOSTS}/gpu-7/models/MAM/logs?tail=2&gpu_id=0").json
    assert log["lines"] == ["MAM@0 says 1", "MAM@0 says 2"]
    assert client.get(f"{HOSTS}/gpu-7/models/status/MAM").json[0]["status"] == "RUNNING"
    assert client.post(f"{HOSTS}/gpu-7/models/stop", json=ORDER).json["status"] == "STOPPED"
    assert client.get(f"{HOSTS}/gpu-7/models/status").json == []


def test_the_list_says_which_hosts_can_be_used_and_why_not(fleet: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hosts, "LOOK_S", 1.0)
    items = {item["name"]: item for item in fleet.test_client().get(HOSTS).json["items"]}

    assert [name for name, item in items.items() if item["reachable"]] == ["gpu-7"]
    assert items["gpu-7"]["detail"] is None
    for name, words in {"stranger": "no gpu_admin", "deaf": "within", "gone": "cannot be", "locked": "key"}.items():
        assert words in items[name]["detail"]
    assert "gpa_" not in str(items)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "none/gpus", None, 404, "host_not_found"),
        ("GET", "gone/gpus", None, 502, "host_unreachable"),
        ("GET", "deaf/gpus", None, 504, "host_timeout"),
        ("GET", "locked/gpus", None, 502, "host_unusable"),
        ("GET", "stranger/gpus", None, 502, "host_unusable"),
        ("GET", "stranger/models/status", None, 502, "host_unusable"),
        ("POST", "gpu-7/models/start", {"model_name": "MAMM", "gpu_id": 0}, 400, "bad_request"),
        ("POST", "gpu-7/models/start", {"gpu_id": "0"}, 422, "validation_failed"),
        ("POST", "gpu-7/models/stop", ORDER, 404, "not_found"),
        ("DELETE", "gpu-7/processes/1", None, 403, "forbidden"),
        ("DELETE", "gpu-7/processes/x", None, 422, "validation_failed"),
        ("GET", "gpu-7/models/%2e%2e/logs", None, 404, "not_found"),
        ("GET", "gpu-7/docs", None, 404, "not_found"),
        ("POST", "gpu-7/gpus", {}, 405, "method_not_allowed"),
    ],
)
def test_what_goes_wrong_is_told_clearly(
    fleet: Flask, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: object, status: int, code: str
) -> None:
    if status == 504:
        monkeypatch.setitem(gpu_hosts.ask.__kwdefaults__, "deadline_s", 0.2)
    answer = fleet.test_client().open(f"{HOSTS}/{path}", method=method, json=body)

    assert (answer.status_code, answer.mimetype) == (status, "application/problem+json")
    assert answer.json["code"] == code
    assert "127.0.0.1" not in answer.json["detail"]


def test_a_host_is_told_nothing_of_the_client_and_leads_nowhere(fleet: Flask, stranger: GpuHost) -> None:
    heard: list[bytes] = []

    def listen(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            heard.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        ear = threading.Thread(target=listen, args=(listener,))
        ear.start()
        told = GpuHost("gpu-7", f"http://127.0.0.1:{listener.getsockname()[1]}", "gpa_platform")
        fleet.extensions["settings"].gpu_hosts["gpu-7"] = told
        keys: Keys = fleet.extensions["keys"]
        key = keys.create("ops", [Scope.ADMIN])
        sent = {"X-API-Key": key, "Cookie": "a=b", "X-Forwarded-For": "198.51.100.7", "X-Custom": "of-the-client"}
        assert fleet.test_client().get(f"{HOSTS}/gpu-7/models/status", headers=sent).json == []
        ear.join()
    Stranger.seen.clear()
    fleet.test_client().get(f"{HOSTS}/stranger/gpus", headers={"X-API-Key": key})

    assert b"X-API-Key: gpa_platform\r\n" in heard[0]
    for word in (key.encode(), b"Cookie", b"198.51.100.7", b"of-the-client"):
        assert word not in heard[0]
    assert Stranger.seen == ["/api/v1/gpus"]


def test_only_admins_may_and_changes_are_in_the_audit_log(fleet: Flask) -> None:
    keys: Keys = fleet.extensions["keys"]
    admin, infer = keys.create("ops", [Scope.ADMIN]), keys.create("client", [Scope.INFER])
    client: FlaskClient = fleet.test_client()

    def stop(key: str) -> int:
        return client.post(f"{HOSTS}/gpu-7/models/stop", json=ORDER, headers={"X-API-Key": key}).status_code

    assert client.get(HOSTS, headers={"X-API-Key": infer}).status_code == 403
    assert (stop(infer), stop(admin)) == (403, 404)
    log: Audit = fleet.extensions["audit"]
    target = f"{HOSTS}/gpu-7/models/stop"
    assert [(row.actor, row.action, row.target, row.result) for row in log.newest(action="hosts.stop")] == [
        (infer[4:12], "hosts.stop", target, "403 scope_missing"),
        (admin[4:12], "hosts.stop", f"{target} MAM on GPU 0", "404 not_found"),
    ]


def test_hosts_and_their_keys_are_read_from_the_environment_and_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "keys"
    secret.write_text("gpu-7=gpa_seven\ngpu-8=gpa_eight\n")
    urls = "gpu-7=https://gpu-7.example.com:6004/, gpu-8=http://127.0.0.1:6005"

    hosts = Settings.from_environ({"GPU_HOSTS": urls, "GPU_HOST_KEYS_FILE": str(secret)}).gpu_hosts

    assert [(host.name, host.url, host.key) for host in hosts.values()] == [
        ("gpu-7", "https://gpu-7.example.com:6004", "gpa_seven"),
        ("gpu-8", "http://127.0.0.1:6005", "gpa_eight"),
    ]
    assert "gpa_" not in repr(hosts)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"GPU_HOSTS": "gpu-7"}, "NAME=VALUE"),
        ({"GPU_HOSTS": "local=http://127.0.0.1:6004"}, "GPU_ADMIN_MOUNT"),
        ({"GPU_HOSTS": "a/b=http://127.0.0.1:6004"}, "no name"),
        ({"GPU_HOSTS": "a=ftp://127.0.0.1"}, "URL"),
        ({"GPU_HOSTS": "a=http://me:secret@127.0.0.1"}, "URL"),
        ({"GPU_HOSTS": "a=http://gpu.example.com:6004"}, "GPU_ALLOW_PLAINTEXT"),
        ({"GPU_HOSTS": "a=http://[::1]:6004", "GPU_HOST_KEYS": "b=gpa_1"}, "no host 'b'"),
        ({"GPU_HOSTS": "a=http://[::1]:6004", "GPU_HOST_KEYS_FILE": "/none/such"}, "cannot be read"),
        ({"GPU_HOSTS": "a=http://[::1]:6004", "GPU_HOST_KEYS": "a=1", "GPU_HOST_KEYS_FILE": "/x"}, "one of them"),
    ],
)
def test_a_wrong_table_of_hosts_keeps_the_api_from_starting(environ: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Settings.from_environ(environ)
