"""The Triton runner's part of the contract suite: real tritonservers behind a small Docker Engine."""

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

from gpu_admin.instances import Instance
from gpu_admin.runners.triton.settings import PORTS
from tests.gpu_admin import triton_server
from tests.gpu_admin.cases import Case
from tests.gpu_admin.fake_docker import FakeDocker


def make_section(docker: FakeDocker, repository: Path, *models: str, **settings: object) -> dict[str, object]:
    """Settings of the Triton runner for that Docker and those models, on free ports, with copies on the processor."""
    return {
        "docker_url": docker.url,
        "model_repository_host_path": str(repository),
        "runtime_host_path": None,
        **dict(zip(PORTS, _free_ports(len(PORTS)), strict=True)),
        "gpus": None,
        "model_gpu_configs": {"default": {"kind": "cpu"}},
        "supported_models": list(models),
        **settings,
    }


def make_case(folder: Path) -> Case:
    """Models of the Python backend: one with a template, one that Triton completes, one that fails to load."""
    repository = folder / "models"
    triton_server.write_model(repository, "MAM", files="template")
    triton_server.write_model(repository, "FastFitAll", files="config")
    triton_server.write_model(repository, "broken", "crashing", files="none")
    docker = FakeDocker(folder / "docker", triton_server.program())

    def kill(instance: Instance) -> None:
        assert instance.seen.pid is not None
        os.kill(instance.seen.pid, signal.SIGKILL)

    return Case(
        runner="triton",
        section=make_section(docker, repository, "MAM", "FastFitAll", "broken"),
        model="MAM",
        other="FastFitAll",
        broken="broken",
        broken_reason=triton_server.CRASH,
        kill=kill,
        servers=lambda: len(docker.containers),
        close=docker.close,
    )


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each another one."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
