"""NVIDIA's tritonserver as a process of the test run's own, on CPU, and small models for it.

`make setup` installs it beside the platform's environment, where there is a wheel for the system and its Python.
"""

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Literal
from uuid import uuid4

import requests

from tests.rig import ROOT, free_port, until
from tests.servers import missing

ENVIRONMENT = ROOT / ".venv" / "triton"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SERVER = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages" / "pytriton" / "tritonserver"
LIBRARIES = Path(sysconfig.get_config_var("LIBDIR"))
#: What a crashing model says.
CRASH = "the weights of this model are broken"
#: What a sleeping model logs once its request was cancelled.
CANCELLED = "stopped sleeping: the request was cancelled"
#: Where a template has the instances' place.
PLACEHOLDER = "${instance_group}"
STARTED_S = 60
SHARED_MEMORY = Path("/dev/shm")

#: fast: OUTPUT0 is twice INPUT0, float32 of any length. slow: takes `seconds` to load. crashing: fails to load.
#: hanging: never ends loading. sleeping: each request takes as many seconds as INPUT0's first number says.
Kind = Literal["fast", "slow", "crashing", "hanging", "sleeping"]
#: Which configuration files a model comes with. bare: a template without the placeholder.
Files = Literal["config", "template", "bare", "none"]

_MODEL = """
import time

import triton_python_backend_utils as triton


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(0)
        config.add_input({{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [-1]}})
        config.add_output({{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [-1]}})
        return config

    def initialize(self, args):
        {load}

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        given = triton.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        end = time.monotonic() + ({sleep})
        while time.monotonic() < end:
            if request.is_cancelled():
                triton.Logger.log_info("{cancelled}")
                error = triton.TritonError("cancelled", triton.TritonError.CANCELLED)
                return triton.InferenceResponse(error=error)
            time.sleep(0.02)
        return triton.InferenceResponse([triton.Tensor("OUTPUT0", given * 2)])
"""
_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }} ]
{instance_group}
"""


def write_model(
    repository: Path,
    name: str,
    kind: Kind = "fast",
    files: Files = "config",
    *,
    seconds: float = 1.0,
    template: str | None = None,
) -> Path:
    """A model of the Python backend in a repository; its folder.

    template: the text of its config.pbtxt.template, in place of what `files` would write.
    """
    folder = repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    loads = {
        "slow": f"time.sleep({seconds})",
        "crashing": f"raise RuntimeError({CRASH!r})",
        "hanging": "time.sleep(100_000)",
    }
    sleep = "float(given[0])" if kind == "sleeping" else "0"
    model = _MODEL.format(load=loads.get(kind, "pass"), sleep=sleep, cancelled=CANCELLED)
    (folder / "1" / "model.py").write_text(model)
    config = _CONFIG.format(name=name, instance_group="instance_group [ { count: 1 kind: KIND_CPU } ]")
    bare = _CONFIG.format(name=name, instance_group="")
    if template is not None:
        (folder / "config.pbtxt.template").write_text(template)
    elif files == "config":
        (folder / "config.pbtxt").write_text(config)
    elif files in ("template", "bare"):
        text = bare + PLACEHOLDER if files == "template" else bare
        (folder / "config.pbtxt.template").write_text(text)
    return folder


def program() -> Path:
    """The tritonserver; skips the test where it is not installed or cannot work, in CI fails it."""
    found = SERVER / "bin" / "tritonserver"
    if not found.exists():
        missing("NVIDIA's tritonserver (requirements/triton_server.txt)")
    library = f"libpython{PYTHON}.so.1.0"
    if not (LIBRARIES / library).exists() and find_library(f"python{PYTHON}") is None:
        # Without it every load would hang.
        missing(f"{library}, the shared library of this Python,")
    return found


def backends() -> Path:
    """The folder of its backends, with the stub of this Python in it."""
    folder = SERVER / "backends"
    # A link and no copy: the stub finds its libraries by where it lies.
    with suppress(FileExistsError):
        stub = SERVER / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
        (folder / "python" / "triton_python_backend_stub").symlink_to(stub)
    return folder


def command(repository: Path, http_port: int, grpc_port: int, metrics_port: int) -> list[str]:
    """What starts it on 127.0.0.1, with no model loaded."""
    return [
        str(program()),
        f"--model-repository={repository}",
        f"--backend-directory={backends()}",
        "--model-control-mode=explicit",
        "--exit-timeout-secs=5",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
    ]


def environ(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment in which its Python backend finds this Python and numpy."""
    libraries = [str(LIBRARIES), given.get("LD_LIBRARY_PATH", "")]
    return {
        **given,
        "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{given.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


class TritonProcess:
    """A tritonserver with its children in a process group of their own."""

    def __init__(self, command: list[str], log: Path, environ: Mapping[str, str]) -> None:
        """Starts it; it is not ready yet when this returns."""
        # What a killed server leaves in shared memory is found by this name.
        self._memory = f"tests_{uuid4().hex}"
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*command, f"--backend-config=python,shm-region-prefix-name={self._memory}"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        """End it hard with its children; what it left in shared memory is removed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in SHARED_MEMORY.glob(f"{self._memory}*"):
            left.unlink(missing_ok=True)


class TritonServer:
    """A tritonserver on free ports, for tests that talk to it themselves."""

    def __init__(self, repository: Path, log: Path) -> None:
        """Returns once it is ready."""
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        line = command(repository, self.http_port, self.grpc_port, free_port())
        # A compiled model.py beside the other looks like a change of the model.
        self.server = TritonProcess(line, log, {**environ(), "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            until(self._settled, STARTED_S)
            assert self.server.process.poll() is None, log.read_text()
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> None:
        """Load a model; returns once it serves."""
        answer = requests.post(f"{self.url}/v2/repository/models/{name}/load", json={}, timeout=STARTED_S)
        assert answer.ok, answer.text

    def close(self) -> None:
        """End it."""
        self.server.close()

    def _settled(self) -> bool:
        if self.server.process.poll() is not None:
            return True
        try:
            return requests.get(f"{self.url}/v2/health/ready", timeout=5).ok
        except requests.RequestException:
            return False
