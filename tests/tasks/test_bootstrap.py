"""One URL and one key are enough on a GPU host, and what goes wrong with them is said."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

from app.keys import Keys, Scope
from app.tables import open_database
from tasks import bootstrap
from tasks.options import SettingsError, WorkerSettings
from tasks.settings import ROOT
from tests.rig import free_port, until

TOLD = {"region": "mars", "broker": "redis://:pw@queue/0", "store": "redis://:pw@queue/1"}
CHAT = {"type": "llm", "params": {"messages": [{"role": "user", "content": "hi"}]}}
CONFIG = """
name: 上海 gpu 7
city: Jezero
engines:
  llm: {model_id: echo}
  embedding: {model_id: echo}
"""


class Server:
    """An HTTP server that answers what a test says, in that order, and then the last one again."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], str]] = []
        self.heard: list[tuple[str, str | None]] = []
        answer_next = self._next

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = answer_next(self.path, self.headers["X-API-Key"])
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def say(self, status: int, body: object, **headers: str) -> None:
        self.answers.append((status, headers, body if isinstance(body, str) else json.dumps(body)))

    def _next(self, path: str, key: str | None) -> tuple[int, dict[str, str], str]:
        self.heard.append((path, key))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_worker_asks_with_its_key_until_the_api_answers(server):
    server.say(503, {"code": "database_unavailable", "detail": "later"})
    server.say(200, {**TOLD, "something_newer": 1})

    region = bootstrap.fetch(WorkerSettings(server_url=server.url, api_key="gpi_key"), "mars")

    assert (region.name, region.broker, region.store) == tuple(TOLD.values())
    assert server.heard == [(f"{bootstrap.PATH}?region=mars", "gpi_key")] * 2


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, {"code": "key_refused", "detail": "This key was revoked."}, "This key was revoked. Set server.api_key"),
        (403, {"code": "scope_missing", "detail": "needs worker"}, "GPU_API_KEY"),
        (422, {"code": "validation_failed", "detail": "Unknown region. Near: mars."}, "Near: mars."),
        (404, "<html>nginx</html>", "Look at server.url"),
        (200, "<html>Please log in</html>", "Look at server.url"),
        (200, {"region": "mars"}, "Look at server.url"),
    ],
)
def test_a_refusal_is_final_and_told_in_the_apis_words(server, status, body, said):
    server.say(status, body)

    with pytest.raises(SettingsError, match=said):
        bootstrap.fetch(WorkerSettings(server_url=server.url), "mars")
    assert len(server.heard) == 1


def test_a_redirect_never_takes_the_key_along(server):
    server.say(301, "", Location=f"{server.url}/elsewhere")

    with pytest.raises(SettingsError, match=f"leads to {server.url}/elsewhere"):
        bootstrap.fetch(WorkerSettings(server_url=server.url, api_key="gpi_key"), None)
    assert len(server.heard) == 1


def test_who_asks_an_api_elsewhere_in_plain_text_is_warned_unless_the_settings_say_so(server, caplog):
    server.say(200, TOLD)
    # Connections to it end on this machine, but it does not say so.
    elsewhere = WorkerSettings(server_url=server.url.replace("127.0.0.1", "0.0.0.0"), api_key="gpi_key")

    assert bootstrap.fetch(replace(elsewhere, allow_plaintext=True), None).name == TOLD["region"]
    assert caplog.text == ""
    assert bootstrap.fetch(elsewhere, None).name == TOLD["region"]
    assert "GPU_ALLOW_PLAINTEXT" in caplog.text
    assert "gpi_key" not in caplog.text


def test_an_api_that_stays_away_ends_the_patience():
    away = WorkerSettings(server_url=f"http://127.0.0.1:{free_port()}")

    with pytest.raises(bootstrap.ServerAway, match="Connection refused"):
        bootstrap.fetch(away, None, patience_s=0.6)


def test_what_the_settings_say_wins_over_the_api(server):
    server.say(200, TOLD)
    asking = WorkerSettings(server_url=server.url, store_url="redis://mine/1")
    knowing = WorkerSettings(server_url=server.url, store_url="redis://mine/1", broker_url="redis://mine/0")
    environ = {"GPU_STORE_URL": "redis://mine/1", "GPU_BROKER_URL": "redis://mine/0"}

    assert bootstrap.home({}, asking).store == "redis://mine/1"
    assert bootstrap.home({}, asking).broker == TOLD["broker"]
    heard = len(server.heard)
    assert bootstrap.home(environ, knowing).broker == "redis://mine/0"
    assert bootstrap.home({"REGIONS": '{"moon": {}}'}, asking).name == "moon"
    assert len(server.heard) == heard


@pytest.fixture
def api(valkey, database_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a real API with one region of its own; workers are to use another name of its servers."""
    port = free_port()
    inside, outside = valkey.url, valkey.url.replace("127.0.0.1", "localhost")
    regions = {
        "mars": {
            "broker": f"{inside}/0",
            "store": f"{inside}/1",
            "worker_broker": f"{outside}/0",
            "worker_store": f"{outside}/1",
        }
    }
    environ = {**_bare(), "DATABASE_URL": database_url, "PORT": str(port), "REGIONS": json.dumps(regions)}
    with (tmp_path / "api.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "app.serve"], cwd=tmp_path, env=environ, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "api.log").read_text()
        try:
            return requests.get(f"{url}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    until(answers, 40)
    yield url
    process.kill()
    process.wait()


@pytest.fixture
def make_key(database_url: str) -> Callable[[Scope], str]:
    def make(scope: Scope) -> str:
        return Keys(open_database(database_url)).create("test", [scope])

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts workers on a host that has a config.yaml and nothing else; they write to worker.log."""
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    started = []

    def begin(**environ: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "worker.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "tasks", "worker"],
                    cwd=folder,
                    env={**_bare(), **environ},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_a_worker_with_one_url_and_one_key_serves_its_region(api, make_key, start, tmp_path, valkey):
    client = {"X-API-Key": make_key(Scope.INFER)}
    worker = start(GPU_SERVER_URL=api, GPU_API_KEY=make_key(Scope.WORKER))
    log = tmp_path / "worker.log"
    until(lambda: "serves" in log.read_text() or worker.poll() is not None, 40)

    answer = requests.post(f"{api}/api/v1/jobs/sync?timeout=20", json=CHAT, headers=client, timeout=30)

    assert answer.status_code == 200, log.read_text()
    (card,) = map(json.loads, valkey.client().hgetall("cards").values())
    assert (card["name"], card["region"], card["city"]) == ("上海 gpu 7", "mars", "Jezero")
    assert set(card["models"]) == {"llm", "embedding"}
    assert card["worker_id"].isascii()


def test_a_worker_whose_key_is_not_for_workers_says_so_and_ends(api, make_key, start, tmp_path):
    worker = start(GPU_SERVER_URL=api, GPU_API_KEY=make_key(Scope.INFER))

    assert worker.wait(40) == 78
    said = (tmp_path / "worker.log").read_text()
    assert "This needs a key with scope worker; yours has infer." in said
    assert "Traceback" not in said


def _bare() -> dict[str, str]:
    """The environment of a host that nobody has told anything."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_", "REGIONS"))}
    return {**kept, "PYTHONPATH": str(ROOT)}
