"""A small Docker Engine on a unix socket, for Docker's own SDK; its containers are tritonservers on this host.

What is asked of it beyond what is written here answers 404 and is found in `unknown`. Containers have the host's
network: a port is the same inside and outside.
"""

import json
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

import psutil

from tests.gpu_admin import triton_server

API = "1.41"
IMAGE = "nvcr.io/nvidia/tritonserver:25.04-py3"
NO_NVIDIA = 'could not select device driver "" with capabilities: [[gpu]]'
NEVER = "0001-01-01T00:00:00Z"
Answer = tuple[int, Any]


class Refused(Exception):
    """What the engine answers in place of what was asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.answer: Answer = (status, {"message": message})


@dataclass
class Container:
    """A container; its process is a tritonserver of this host."""

    id: str
    name: str
    #: As the SDK sent it, with HostConfig in it.
    config: dict[str, Any]
    log: Path
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: datetime | None = None
    triton: triton_server.TritonProcess | None = None

    @property
    def host_config(self) -> dict[str, Any]:
        """DeviceRequests, ShmSize, Binds, PortBindings, NetworkMode and so on."""
        given: dict[str, Any] = self.config.get("HostConfig") or {}
        return given

    @property
    def running(self) -> bool:
        """Whether its process is there now."""
        return self.triton is not None and self.triton.process.poll() is None

    @property
    def pid(self) -> int:
        """Its process on this host; 0 without one."""
        return self.triton.process.pid if self.triton is not None and self.running else 0

    @property
    def status(self) -> str:
        """created, running or exited."""
        if self.triton is None:
            return "created"
        return "running" if self.running else "exited"

    @property
    def exit_code(self) -> int:
        """0 as long as it has not ended; 128 and the signal's number after a signal."""
        code = self.triton.process.poll() if self.triton is not None else 0
        return 0 if code is None else 128 - code if code < 0 else code

    def launch(self, program: Path) -> None:
        """Start its process, with the folders of the host where the container would have them bound."""
        if self.triton is not None:
            self.triton.close()
        places = dict(reversed(bind.split(":")[:2]) for bind in self.host_config.get("Binds") or [])
        # The longest first, or /models would be replaced in /models/cache.
        inside = sorted(places, key=len, reverse=True)
        arguments = []
        for argument in self.config["Cmd"][1:]:
            found = next((p for p in inside if re.search(rf"(^|=){re.escape(p)}(/|$)", argument)), None)
            arguments.append(argument.replace(found, places[found], 1) if found else argument)
        command = [str(program), *arguments, f"--backend-directory={triton_server.backends()}"]
        given = dict(pair.split("=", 1) for pair in self.config.get("Env") or [])
        # Nothing of this process's environment: a container has none of it either.
        environ = {**triton_server.environ({}), **given}
        self.triton = triton_server.TritonProcess(command, self.log, environ)
        self.started = datetime.now(UTC)

    def end(self, number: int, seconds: float | None) -> None:
        """Send a signal, and SIGKILL to what is there still after so many seconds; never with None."""
        if self.triton is None:
            return
        self.triton.process.send_signal(number)
        if seconds is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.triton.process.wait(seconds)
        self.triton.close()


class FakeDocker:
    """The engine. Public attributes may be changed by a test at any time."""

    def __init__(self, folder: Path, tritonserver: Path) -> None:
        """Answers when this returns. tritonserver: what runs as the first word of every container's command."""
        self.images = {IMAGE}
        #: What can be pulled, and how long that takes.
        self.registry: set[str] = set()
        self.pull_s = 0.0
        #: Whether the host has NVIDIA's container runtime.
        self.nvidia = True
        #: By id, stopped ones too.
        self.containers: dict[str, Container] = {}
        #: The requests that it does not know.
        self.unknown: list[str] = []
        self._folder = folder
        self._tritonserver = tritonserver
        # Not under pytest's folder: the path of a socket must be short.
        self._socket_folder = Path(tempfile.mkdtemp(prefix="docker-"))
        self._socket = self._socket_folder / "docker.sock"
        self._lock = threading.RLock()
        self._answering = threading.Event()
        self._answering.set()
        self._server: _Server | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.up()

    @property
    def url(self) -> str:
        """For DOCKER_HOST and docker.DockerClient(base_url=...)."""
        return f"unix://{self._socket}"

    def up(self) -> None:
        """Answer again."""
        self._server = _Server(str(self._socket), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """The engine goes away; its containers go on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._socket.unlink(missing_ok=True)
            self._server = None

    def freeze(self) -> None:
        """Requests are taken, and nothing answers them until thaw()."""
        self._answering.clear()

    def thaw(self) -> None:
        """Answer what was asked meanwhile."""
        self._answering.set()

    def close(self) -> None:
        """End the engine and everything that it started."""
        self.thaw()
        self.down()
        with self._lock:
            # A request that is under way starts nothing any more.
            left, self.containers = self.containers, {}
        for container in left.values():
            container.end(signal.SIGKILL, 10)
        shutil.rmtree(self._socket_folder, ignore_errors=True)

    def running(self) -> list[Container]:
        """The containers that run now."""
        return [container for container in list(self.containers.values()) if container.running]

    def named(self, name: str) -> Container:
        """The container of that name, id or beginning of an id."""
        for container in list(self.containers.values()):
            if name == container.name or container.id.startswith(name):
                return container
        raise Refused(404, f"No such container: {name}")

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Answer:
        """Status and body of a request; bytes are sent as they are, None is no body."""
        self._answering.wait()
        for allowed, pattern, act in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == allowed:
                try:
                    return act(self, *found.groups(), query, body)
                except Refused as refused:
                    return refused.answer
        self.unknown.append(f"{method} {path}")
        return 404, {"message": "page not found"}

    def _ping(self, query: Mapping[str, str], body: Any) -> Answer:
        return 200, b"OK"

    def _version(self, query: Mapping[str, str], body: Any) -> Answer:
        return 200, {"Version": "20.10.24", "ApiVersion": API, "MinAPIVersion": "1.12", "Os": "linux"}

    def _info(self, query: Mapping[str, str], body: Any) -> Answer:
        runtimes = ["runc", "nvidia"] if self.nvidia else ["runc"]
        return 200, {
            "ServerVersion": "20.10.24",
            "Containers": len(self.containers),
            "ContainersRunning": len(self.running()),
            "Runtimes": {name: {"path": name} for name in runtimes},
            "DefaultRuntime": "runc",
        }

    def _list_images(self, query: Mapping[str, str], body: Any) -> Answer:
        return 200, [_image(name) for name in sorted(self.images)]

    def _inspect_image(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        for known in self.images:
            if _tagged(name) == known or name == _image(known)["Id"]:
                return 200, _image(known)
        raise Refused(404, f"No such image: {_tagged(name)}")

    def _pull(self, query: Mapping[str, str], body: Any) -> Answer:
        name = _tagged(":".join(filter(None, (query["fromImage"], query.get("tag")))))
        threading.Event().wait(self.pull_s)
        if name not in self.registry:
            raise Refused(404, f"manifest for {name} not found: manifest unknown: manifest unknown")
        self.images.add(name)
        return 200, f'{{"status": "Status: Downloaded newer image for {name}"}}\r\n'.encode()

    def _create(self, query: Mapping[str, str], body: Any) -> Answer:
        with self._lock:
            self._inspect_image(body["Image"], query, body)
            id = uuid4().hex * 2
            name = query.get("name", id[:12])
            for other in self.containers.values():
                if other.name == name:
                    raise Refused(
                        409,
                        f'Conflict. The container name "/{name}" is already in use by container "{other.id}". '
                        "You have to remove (or rename) that container to be able to reuse that name.",
                    )
            # As inspected later, what was not said has its default.
            said = {key: value for key, value in body.items() if value is not None}
            config = {"Tty": False, "Cmd": ["tritonserver"], "Env": [], "Labels": {}, **said}
            self.containers[id] = Container(id, name, config, self._folder / f"{name}-{id[:12]}.log")
        return 201, {"Id": id, "Warnings": []}

    def _start(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        with self._lock:
            container = self.named(name)
            if container.running:
                return 304, None
            if container.host_config.get("DeviceRequests") and not self.nvidia:
                raise Refused(500, NO_NVIDIA)
            for port in _taken(container):
                raise Refused(
                    500,
                    f"driver failed programming external connectivity on endpoint {container.name} ({container.id}): "
                    f"Error starting userland proxy: listen tcp4 {port}: bind: address already in use",
                )
            container.launch(self._tritonserver)
        return 204, None

    def _inspect(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self.named(name)
        return 200, {
            "Id": container.id,
            "Name": f"/{container.name}",
            "Created": container.created.isoformat(),
            "Path": container.config["Cmd"][0],
            "Args": container.config["Cmd"][1:],
            "State": {
                "Status": container.status,
                "Running": container.running,
                "Paused": False,
                "Restarting": False,
                "OOMKilled": False,
                "Dead": False,
                "Pid": container.pid,
                "ExitCode": container.exit_code,
                "Error": "",
                "StartedAt": container.started.isoformat() if container.started else NEVER,
                "FinishedAt": NEVER,
            },
            "Image": _image(_tagged(container.config["Image"]))["Id"],
            "Config": {key: value for key, value in container.config.items() if key != "HostConfig"},
            "HostConfig": container.host_config,
            "NetworkSettings": {"Ports": container.host_config.get("PortBindings") or {}},
        }

    def _list(self, query: Mapping[str, str], body: Any) -> Answer:
        filters = json.loads(query.get("filters") or "{}")
        every = query.get("all") in ("1", "true", "True") or "status" in filters
        found = []
        for container in list(self.containers.values()):
            labels = container.config.get("Labels") or {}
            stated = {*labels, *(f"{key}={value}" for key, value in labels.items())}
            if (
                (every or container.running)
                and all(label in stated for label in filters.get("label", []))
                and container.status in filters.get("status", [container.status])
                and any(re.search(name, f"/{container.name}") for name in filters.get("name", [""]))
            ):
                found.append(
                    {
                        "Id": container.id,
                        "Names": [f"/{container.name}"],
                        "Image": container.config["Image"],
                        "State": container.status,
                        "Labels": labels,
                        "Created": int(container.created.timestamp()),
                    }
                )
        return 200, found

    def _top(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self._that_runs(name)
        rows = []
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(container.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    command = " ".join(process.cmdline())
                    rows.append(["root", str(process.pid), str(process.ppid()), "0", "09:00", "?", "00:00:00", command])
        return 200, {"Titles": ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"], "Processes": rows}

    def _logs(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self.named(name)
        lines = container.log.read_bytes().splitlines(keepends=True) if container.log.exists() else []
        tail = query.get("tail", "all")
        if tail != "all":
            lines = lines[max(0, len(lines) - int(tail)) :]
        # Without a terminal each piece says its stream (2: stderr) and its length.
        return 200, b"".join(struct.pack(">BxxxL", 2, len(line)) + line for line in lines)

    def _stop(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self.named(name)
        if not container.running:
            return 304, None
        container.end(signal.SIGTERM, float(query.get("t", 10)))
        return 204, None

    def _kill(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self._that_runs(name)
        asked = query.get("signal", "SIGKILL")
        number = int(asked) if asked.isdigit() else signal.Signals[asked]
        # Only this one is sure to end it, and then its children with it.
        container.end(number, 10 if number == signal.SIGKILL else None)
        return 204, None

    def _wait(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        container = self.named(name)
        if container.triton is not None:
            container.triton.process.wait()
        return 200, {"StatusCode": container.exit_code, "Error": None}

    def _remove(self, name: str, query: Mapping[str, str], body: Any) -> Answer:
        with self._lock:
            container = self.named(name)
            if container.running and query.get("force") not in ("1", "true", "True"):
                raise Refused(
                    409,
                    f"You cannot remove a running container {container.id}. Stop the container before attempting "
                    "removal or force remove",
                )
            container.end(signal.SIGKILL, 10)
            del self.containers[container.id]
        return 204, None

    def _that_runs(self, name: str) -> Container:
        container = self.named(name)
        if not container.running:
            raise Refused(409, f"Container {container.id} is not running")
        return container

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            """One request a connection, so that down() leaves none open."""

            def do(self) -> None:
                """Answer a request."""
                url = urlsplit(self.path)
                path = re.sub(r"^/v1\.\d+", "", unquote(url.path))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = engine.answer(
                    self.command, path, dict(parse_qsl(url.query)), json.loads(body) if body else None
                )
                content = (
                    answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
                )
                kind = "text/plain" if isinstance(answer, bytes) else "application/json"
                with suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Api-Version", API)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_DELETE = do_HEAD = do_PUT = do  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                """Nothing to stderr."""

        return Handler


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    # A pull or a wait may last; it ends with the process.
    block_on_close = False


def _taken(container: Container) -> Iterator[str]:
    """The addresses of this host that it would publish and that another has."""
    for bindings in (container.host_config.get("PortBindings") or {}).values():
        for binding in bindings:
            address, port = binding.get("HostIp") or "0.0.0.0", int(binding["HostPort"])
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError:
                    yield f"{address}:{port}"


def _tagged(image: str) -> str:
    """An image's name with its tag."""
    return image if ":" in image.rpartition("/")[2] else f"{image}:latest"


def _image(name: str) -> dict[str, Any]:
    return {"Id": f"sha256:{sha256(name.encode()).hexdigest()}", "RepoTags": [name], "Os": "linux", "Size": 1}


_ID = r"/containers/([^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", "/_ping", FakeDocker._ping),
    ("HEAD", "/_ping", FakeDocker._ping),
    ("GET", "/version", FakeDocker._version),
    ("GET", "/info", FakeDocker._info),
    ("GET", "/images/json", FakeDocker._list_images),
    ("POST", "/images/create", FakeDocker._pull),
    ("GET", "/images/(.+)/json", FakeDocker._inspect_image),
    ("GET", "/containers/json", FakeDocker._list),
    ("POST", "/containers/create", FakeDocker._create),
    ("GET", f"{_ID}/json", FakeDocker._inspect),
    ("POST", f"{_ID}/start", FakeDocker._start),
    ("GET", f"{_ID}/top", FakeDocker._top),
    ("GET", f"{_ID}/logs", FakeDocker._logs),
    ("POST", f"{_ID}/stop", FakeDocker._stop),
    ("POST", f"{_ID}/kill", FakeDocker._kill),
    ("POST", f"{_ID}/wait", FakeDocker._wait),
    ("DELETE", _ID, FakeDocker._remove),
)
