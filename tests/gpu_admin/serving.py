"""gunicorn with the admin API, as a process that tests start and end."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil
import requests

from tests.gpu_admin import seed_host
from tests.rig import ROOT, until

GUNICORN = Path(sys.executable).parent / "gunicorn"
UP_S = 40
STATUS = 'curl -X GET "http://localhost:6004/api/v1/models/status"'


class Server:
    """`gunicorn 'gpu_admin:create_app()'`, serving when this returns."""

    def __init__(self, environ: dict[str, str], port: int, log: Path, *options: str) -> None:
        self.port = port
        # No pipe: the model servers inherit it here, and live on.
        with log.open("wb") as out:
            self.process = start(environ, out, *options)
        until(lambda: self.process.poll() is not None or self.answers(), UP_S)
        assert self.process.poll() is None, log.read_text()

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/", timeout=5).ok
        except requests.ConnectionError:
            return False

    def run(self, command: str) -> object:
        """What a command of the seed prints, on this test's port."""
        command = command.replace("curl", "curl -s --noproxy '*'", 1).replace(
            "localhost:6004", f"localhost:{self.port}"
        )
        return json.loads(subprocess.run(command, shell=True, check=True, capture_output=True).stdout)

    def statuses(self) -> list[str]:
        """Of every model."""
        found = self.run(STATUS)
        assert isinstance(found, list)
        return [item["status"] for item in found]

    def pids(self) -> list[int | None]:
        """Of every model's server."""
        found = self.run(STATUS.replace("status", "instances"))
        assert isinstance(found, list)
        return [item["pid"] for item in found]

    def stop(self) -> int:
        """End it as systemd does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(UP_S)


def start(
    environ: dict[str, str], out: int | IO[bytes], *options: str, app: str = "gpu_admin:create_app()"
) -> "subprocess.Popen[bytes]":
    """gunicorn in the project's folder."""
    return subprocess.Popen([GUNICORN, *options, app], cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT)


@contextmanager
def served(environ: dict[str, str], port: int, folder: Path) -> Iterator[Server]:
    """The seed's host on a port, its data in the folder; it and its model servers end with the context."""
    server = Server(environ, port, folder / "gunicorn.log")
    try:
        yield server
    finally:
        end(server, folder)


def end(server: Server, folder: Path) -> None:
    """End the server and every model server that it started. folder: where seed_host.environ() was told to be."""
    if server.process.poll() is None:
        for process in [*psutil.Process(server.process.pid).children(), server.process]:
            process.kill()
    server.process.wait()
    seed_host.end_servers(folder / "data")
