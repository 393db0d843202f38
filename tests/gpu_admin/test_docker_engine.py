"""A real Docker engine: the fake one answers as it does, and the Triton runner works with its containers."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
import requests
from docker.errors import APIError, ImageNotFound, NotFound
from docker.types import DeviceRequest

from gpu_admin.contract import InstanceStatus, Place, StartFailed
from gpu_admin.runners.triton import Runner
from tests.gpu_admin import docker_engine, fake_docker, triton_server
from tests.gpu_admin.docker_engine import DockerEngine
from tests.gpu_admin.fake_docker import FakeDocker
from tests.rig import free_port, until

READY_S = 60


@dataclass(frozen=True)
class Engine:
    """One of the two, as a client of Docker sees it."""

    client: docker.DockerClient
    image: str

    def run(self, repository: Path, port: int, **beside: Any) -> Any:
        """A container with a tritonserver."""
        return self.client.containers.run(
            self.image,
            [
                "tritonserver",
                "--model-repository=/models",
                "--model-control-mode=explicit",
                f"--http-port={port}",
                f"--grpc-port={free_port()}",
                "--allow-metrics=false",
            ],
            name="tests_triton",
            labels={"tests": "yes"},
            detach=True,
            network_mode="host",
            volumes={str(repository): {"bind": "/models", "mode": "rw"}},
            **beside,
        )


@pytest.fixture(scope="module")
def started() -> Iterator[DockerEngine]:
    """The real one, for all tests: its image takes seconds."""
    with closing(DockerEngine()) as engine:
        yield engine


@pytest.fixture
def docker_server(started: DockerEngine) -> Iterator[DockerEngine]:
    """The real one, without containers."""
    yield started
    for left in started.client.containers.list(all=True):
        left.remove(force=True)


@pytest.fixture(params=["fake", "real"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Both, without containers; neither has NVIDIA's runtime."""
    if request.param == "fake":
        with closing(FakeDocker(tmp_path / "engine", triton_server.program())) as fake:
            fake.nvidia = False
            with closing(docker.DockerClient(base_url=fake.url)) as client:
                yield Engine(client, fake_docker.IMAGE)
            assert fake.unknown == []
    else:
        real: DockerEngine = request.getfixturevalue("docker_server")
        yield Engine(real.client, docker_engine.IMAGE)


def test_a_container_lives_and_dies_alike_in_both_engines(engine: Engine, tmp_path: Path) -> None:
    port = free_port()
    container = engine.run(tmp_path, port)
    until(lambda: is_ready(port), READY_S)

    container.reload()
    pid = container.attrs["State"]["Pid"]
    titles, rows = (container.top()[key] for key in ("Titles", "Processes"))
    assert container.status == "running"
    assert "tritonserver" in psutil.Process(pid).name()
    assert str(pid) in [row[titles.index("PID")] for row in rows]
    assert b"Started HTTPService" in container.logs(tail=3)
    assert len(container.logs(tail=3).splitlines()) == 3
    for filters in ({"name": "^/tests_triton$"}, {"label": "tests=yes"}, {"status": "running"}):
        assert [found.id for found in engine.client.containers.list(filters=filters)] == [container.id]
    assert engine.client.containers.list(filters={"label": "tests=no"}) == []

    with pytest.raises(APIError, match='The container name "/tests_triton" is already in use') as taken:
        engine.run(tmp_path, port)
    with pytest.raises(APIError, match="You cannot remove a running container") as running:
        container.remove()
    assert (taken.value.status_code, running.value.status_code) == (409, 409)

    os.kill(pid, signal.SIGKILL)
    assert container.wait(timeout=READY_S)["StatusCode"] == 137
    container.reload()
    assert (container.status, container.attrs["State"]["Pid"]) == ("exited", 0)
    assert engine.client.containers.list() == []
    with pytest.raises(APIError, match="is not running") as gone:
        container.top()
    assert gone.value.status_code == 409

    container.start()
    until(lambda: is_ready(port), READY_S)
    container.stop(timeout=10)
    container.stop(timeout=10)
    container.reload()
    assert (container.status, container.attrs["State"]["ExitCode"]) == ("exited", 0)
    container.remove()
    with pytest.raises(NotFound, match="No such container: tests_triton"):
        engine.client.containers.get("tests_triton")


def test_what_cannot_start_is_refused_alike(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="No such image: tests/nothing:1"):
        engine.client.images.get("tests/nothing:1")
    with pytest.raises(ImageNotFound, match="No such image: tests/nothing:1"):
        engine.client.containers.create("tests/nothing:1", ["tritonserver"])
    with pytest.raises(APIError, match="could not select device driver") as refused:
        engine.run(tmp_path, free_port(), device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])])
    assert refused.value.status_code == 500
    (left,) = engine.client.containers.list(all=True)
    assert left.status == "created"


def test_the_runner_serves_models_from_a_real_container(docker_server: DockerEngine, tmp_path: Path) -> None:
    triton_server.write_model(tmp_path / "models", "MAM", "fast", "template")
    settings = section(docker_server, tmp_path)
    runner, other = (Runner(settings, Place(tmp_path / "triton", lambda gpu_id, pids: None)) for _ in range(2))
    wanted = runner.read_config("MAM", 0, {})
    runner.check(wanted)

    runner.start(wanted, lambda: False)
    (container,) = docker_server.client.containers.list(all=True)
    seen = runner.status(wanted)
    assert (seen.status, seen.reason) == (InstanceStatus.RUNNING, None)
    assert seen.pid == container.attrs["State"]["Pid"]
    assert seen.pid in seen.pids
    assert seen.port == settings["http_port"]
    assert infer(settings["http_port"], "MAM", [1, 2]) == [2, 4]
    assert container.attrs["HostConfig"]["ShmSize"] == 64 * 2**20

    # As after a restart of the service.
    other.start(wanted, lambda: False)
    assert other.status(wanted) == seen
    assert any("successfully loaded 'MAM'" in line for line in other.log(wanted, 20))
    assert [found.id for found in docker_server.client.containers.list(all=True)] == [container.id]

    other.stop(wanted)
    assert runner.status(wanted).status is InstanceStatus.STOPPED
    assert docker_server.client.containers.list(all=True) == []


def test_the_runner_leaves_nothing_behind_where_the_engine_has_no_gpus(
    docker_server: DockerEngine, tmp_path: Path
) -> None:
    triton_server.write_model(tmp_path / "models", "MAM")
    settings = section(docker_server, tmp_path, gpus="all")
    runner = Runner(settings, Place(tmp_path / "triton", lambda gpu_id, pids: None))

    with pytest.raises(StartFailed, match="could not select device driver"):
        runner.start(runner.read_config("MAM", 0, {}), lambda: False)

    assert docker_server.client.containers.list(all=True) == []


def test_the_runner_says_which_image_cannot_be_had(docker_server: DockerEngine, tmp_path: Path) -> None:
    triton_server.write_model(tmp_path / "models", "MAM")
    # A registry that is not there: nobody else's is asked.
    settings = section(docker_server, tmp_path, image_name="127.0.0.1:9/nothing:1")
    runner = Runner(settings, Place(tmp_path / "triton", lambda gpu_id, pids: None))

    with pytest.raises(StartFailed, match=r"127\.0\.0\.1:9/nothing:1"):
        runner.start(runner.read_config("MAM", 0, {}), lambda: False)

    assert docker_server.client.containers.list(all=True) == []


def section(engine: DockerEngine, folder: Path, **changed: Any) -> dict[str, Any]:
    """Settings of the Triton runner under which models run on the processor."""
    return {
        "docker_url": engine.url,
        "image_name": docker_engine.IMAGE,
        "network_mode": "host",
        "gpus": None,
        "shm_size": "64m",
        "http_port": free_port(),
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "model_repository_host_path": str(folder / "models"),
        "runtime_host_path": None,
        "api_timeout_seconds": 30,
        "supported_models": ["MAM"],
        "model_gpu_configs": {"default": {"kind": "cpu"}},
        **changed,
    }


def infer(port: int, model: str, numbers: list[float]) -> list[float]:
    """What a model makes of numbers."""
    given = {"name": "INPUT0", "shape": [len(numbers)], "datatype": "FP32", "data": numbers}
    answer = requests.post(f"http://127.0.0.1:{port}/v2/models/{model}/infer", json={"inputs": [given]}, timeout=10)
    assert answer.ok, answer.text
    found: list[float] = answer.json()["outputs"][0]["data"]
    return found


def is_ready(port: int) -> bool:
    """Whether a tritonserver answers there."""
    try:
        return requests.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).ok
    except requests.RequestException:
        return False
