"""gunicorn as the seed's readers start it: a real server process, asked by the seed's own commands."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import Card, NvmlStub
from tests.gpu_admin.serving import UP_S, Server, end, start
from tests.rig import ROOT, free_port, until

#: The seed's examples, as they stand there.
START = """curl -X POST "http://localhost:6004/api/v1/models/start" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model_name": "MAM",
    "gpu_id": 0
  }'"""
STOP = START.replace("models/start", "models/stop")
GPUS = 'curl -X GET "http://localhost:6004/api/v1/gpus"'
WELCOME = 'curl -X GET "http://localhost:6004/"'


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def environ(tmp_path: Path, nvml: NvmlStub, port: int) -> dict[str, str]:
    nvml.write([Card(used_mib=11_183), Card()])
    return {**os.environ, **nvml.environ, **seed_host.environ(tmp_path, port)}


@pytest.fixture
def serve(environ: dict[str, str], port: int, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def serve(*options: str) -> Server:
        servers.append(Server(environ, port, tmp_path / f"gunicorn{len(servers)}.log", *options))
        return servers[-1]

    yield serve
    for server in servers:
        end(server, tmp_path)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_seeds_examples_work_as_written_and_models_outlive_a_restart(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    first = serve()
    welcome, [gpu, _], begun = first.run(WELCOME), first.run(GPUS), first.run(START)  # type: ignore[misc]

    assert welcome == {"status": "ok", "message": "Welcome to the Model Inference Client API"}
    assert (gpu["id"], gpu["memory_usage"], gpu["power_draw"], gpu["processes"]) == (0, 45.5, 150.7, [])
    assert (begun["active_gpu_ids"], begun["total_instances"]) == ([0], 8)
    until(lambda: first.statuses() == ["RUNNING"], UP_S)
    # One is still being started when the service ends.
    gate = seed_host.hold_starts(tmp_path / "data", "FastFitAll")
    first.run(START.replace("MAM", "FastFitAll"))
    until(lambda: None not in first.pids(), UP_S)
    pids = first.pids()

    assert first.stop() == 0
    second = serve()

    assert second.statuses() == ["RUNNING", "STARTING"]
    gate.unlink()
    until(lambda: second.statuses() == ["RUNNING", "RUNNING"], UP_S)
    assert second.pids() == pids
    stopped = second.run(STOP)
    assert stopped["status"] == "STOPPED"  # type: ignore[index]
    assert second.statuses() == ["RUNNING"]


def test_several_server_processes_agree(serve: Callable[..., Server]) -> None:
    server = serve("--workers", "2")
    bodies = {"model_name": "MAM", "gpu_id": 0}
    answers = [
        requests.post(f"http://127.0.0.1:{server.port}/api/v1/models/start", json=bodies, timeout=20) for _ in range(6)
    ]

    assert {answer.status_code for answer in answers} == {202}
    until(lambda: [server.statuses() for _ in range(6)] == [["RUNNING"]] * 6, UP_S)


def test_a_large_body_is_answered(serve: Callable[..., Server]) -> None:
    server = serve()
    url = f"http://127.0.0.1:{server.port}/api/v1/models/start"

    answer = requests.post(url, data=b"x" * 300_000, headers={"Content-Type": "application/json"}, timeout=20)

    assert (answer.status_code, list(answer.json())) == (413, ["detail"])
    assert requests.post(url, data=b"{}", timeout=20).status_code == 400


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ([], {"GPU_ADMIN_HOST": "0.0.0.0"}, "0.0.0.0 can be reached from elsewhere.*gpu_admin.keys create"),
        (["--bind", "0.0.0.0:1"], {}, "0.0.0.0 can be reached from elsewhere"),
        ([], {"GPU_ADMIN_PORT": "none"}, "GPU_ADMIN_PORT"),
        ([], {"GPU_ADMIN_TRITON_CLASS": "no_such_module:Runner"}, "no_such_module:Runner cannot be imported"),
    ],
    ids=["address", "option", "port", "runner"],
)
def test_it_refuses_to_start_as_configured_and_says_why_on_one_line(
    environ: dict[str, str], options: list[str], changes: dict[str, str], words: str
) -> None:
    process = start({**environ, **changes}, subprocess.PIPE, *options)
    said = process.communicate(timeout=UP_S)[0].decode()

    assert process.returncode == 2
    *_, last = said.splitlines()
    assert re.match(f"The admin API does not start: .*{words}", last)
    assert "Traceback" not in said


def test_with_a_key_it_listens_where_it_is_told(
    environ: dict[str, str], serve: Callable[..., Server], port: int
) -> None:
    environ["GPU_ADMIN_HOST"] = "0.0.0.0"
    command = [sys.executable, "-m", "gpu_admin.keys", "create", "ops", "--scope", "read"]
    key = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout.strip()
    server = serve()

    assert [address.laddr.port for address in psutil.Process(server.process.pid).net_connections("tcp")] == [port]
    url = f"http://127.0.0.1:{port}/api/v1/gpus"
    assert requests.get(url, timeout=20).status_code == 401
    assert requests.get(url, headers={"X-API-Key": key}, timeout=20).status_code == 200


def test_another_app_is_served_from_this_folder_as_ever(environ: dict[str, str]) -> None:
    said = (
        start(environ, subprocess.PIPE, "--print-config", app="wsgiref.simple_server:demo_app")
        .communicate(timeout=UP_S)[0]
        .decode()
    )

    assert re.search(r"^bind +=? *\['127.0.0.1:8000'\]", said, re.MULTILINE), said
    assert re.search(r"^worker_class +=? *sync", said, re.MULTILINE), said
