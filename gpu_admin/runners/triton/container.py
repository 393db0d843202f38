"""Triton's container, by Docker's own SDK. Docker is asked each time; every call has a deadline."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import docker
import requests
import urllib3
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest

from gpu_admin.contract import StartFailed, Unavailable
from gpu_admin.runners.triton.settings import TritonSettings

logger = logging.getLogger(__name__)

#: For one question to Docker that somebody waits for.
QUICK_S = 0.8
#: Connections that are kept to Docker; as many as look at instances at once.
CONNECTIONS = 32
#: Says that a container was made here, and may be removed here.
LABEL = "gpu_admin.runner"
#: After SIGTERM Triton waits for so long until requests have ended and clients have closed their connections.
EXIT_S = 10
#: Before it is killed. Its models are unloaded by then, their requests done; it may still wait for idle clients.
STOP_S = 5
LOG_LINES = 20
MOST_LOG_LINES = 10_000
#: CUDA counts GPUs by speed unless told; NVML, whose numbers callers use, by bus.
ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@dataclass(frozen=True, slots=True)
class Found:
    """The container of the configured name, as Docker sees it."""

    id: str
    #: Docker's word: created, running, paused, restarting, removing, exited, dead.
    status: str
    #: Made here, by its label.
    ours: bool
    #: Its main process on this host.
    pid: int | None
    exit_code: int
    out_of_memory: bool
    #: Docker's own words on why it did not start.
    error: str

    @property
    def running(self) -> bool:
        """Whether it has a process, which may be paused."""
        return self.pid is not None

    @property
    def end(self) -> str:
        """How it ended, for people."""
        if self.out_of_memory:
            return "ran out of memory"
        signal = f" (signal {self.exit_code - 128})" if self.exit_code > 128 else ""
        return f"ended with code {self.exit_code}{signal}{': ' if self.error else ''}{self.error}"


class Container:
    """The one container that all models of this runner share."""

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings
        self.name = settings.container_name
        self._clients: dict[float, Any] = {}

    def look(self) -> Found | None:
        """What there is of it now, within two seconds. Raises Unavailable."""
        with self._docker(QUICK_S) as client:
            try:
                attributes = client.api.inspect_container(self.name)
            except NotFound:
                return None
        state = attributes["State"]
        return Found(
            id=attributes["Id"],
            status=state["Status"],
            ours=LABEL in (attributes["Config"].get("Labels") or {}),
            pid=state["Pid"] or None,
            exit_code=state["ExitCode"],
            out_of_memory=bool(state.get("OOMKilled")),
            error=state.get("Error") or "",
        )

    def check_running(self) -> None:
        """Raises StartFailed if it is known not to run any more; Docker may be away."""
        try:
            found = self.look()
        except Unavailable:
            return
        if found is None or not found.running:
            raise StartFailed(f"The container {self.name} {found.end if found else 'was removed'} meanwhile.")

    def pids(self, found: Found) -> frozenset[int]:
        """Its processes, by their numbers on this host. Raises Unavailable."""
        with self._docker(QUICK_S) as client:
            try:
                top = client.api.top(found.id)
            except APIError as error:
                # It ended meanwhile.
                if error.is_server_error():
                    raise
                return frozenset()
        column = top["Titles"].index("PID")
        return frozenset(int(row[column]) for row in top["Processes"] or ())

    def log(self, tail: int) -> list[str]:
        """Its last lines, oldest first; none where there is no container. Raises Unavailable."""
        with self._docker(QUICK_S) as client:
            try:
                written = client.api.logs(self.name, tail=max(1, min(tail, MOST_LOG_LINES)))
            except NotFound:
                return []
        lines: list[str] = written.decode(errors="replace").splitlines()
        return lines

    def log_end(self) -> list[str]:
        """Its last lines for the report of a failure; none if they cannot be had."""
        try:
            return self.log(LOG_LINES)
        except Unavailable as error:
            logger.warning("the log of container %s cannot be read: %s", self.name, error.detail)
            return []

    def has_image(self) -> bool:
        """Whether the image is on this host. Raises Unavailable."""
        with self._docker(QUICK_S) as client:
            try:
                client.api.inspect_image(self._settings.image_name)
            except ImageNotFound:
                return False
        return True

    def pull(self, look: Callable[[], None]) -> None:
        """Fetch the image; returns once it is here.

        look: called several times a second; what it raises ends the waiting. Raises StartFailed, and Unavailable if
        Docker is silent for as long as the settings allow.
        """
        image = self._settings.image_name
        logger.info("image %s is not here; Docker fetches it", image)
        pulling = _Pull(lambda: self._connect(self._settings.api_timeout_s), image)
        while not pulling.ended.wait(0.2):
            look()
            if time.monotonic() - pulling.heard_at > self._settings.api_timeout_s:
                raise Unavailable(
                    f"Docker fetches the image {image} and has been silent for {self._settings.api_timeout_s:.0f} s."
                )
        if pulling.problem:
            raise StartFailed(
                f"The image {image} (setting triton.image_name) cannot be fetched: {pulling.problem}. "
                "Fetch it by hand with docker pull, or name another one."
            )

    def create(self) -> None:
        """Make it and start it; what somebody else made meanwhile is left as it is. Raises StartFailed, Unavailable."""
        settings = self._settings
        host = settings.network_mode == "host"
        with self._docker(settings.api_timeout_s) as client:
            try:
                created = client.containers.create(
                    settings.image_name,
                    self._command(host),
                    name=self.name,
                    detach=True,
                    labels={LABEL: "triton"},
                    environment=ENVIRONMENT,
                    volumes=self._volumes(),
                    ports=None
                    if host
                    else {f"{port}/tcp": (settings.listen, port) for port in settings.ports.values()},
                    network_mode=settings.network_mode,
                    shm_size=settings.shm_size,
                    device_requests=self._devices(),
                    security_opt=["no-new-privileges"],
                )
            except APIError as error:
                if error.status_code == HTTPStatus.CONFLICT:
                    return
                raise StartFailed(f"Docker did not make the container {self.name}: {_said(error)}") from error
        logger.info("container %s is made from %s", self.name, settings.image_name)
        try:
            with self._docker(settings.api_timeout_s):
                self._start(created)
        except (StartFailed, Unavailable):
            with contextlib.suppress(Unavailable), self._docker(settings.api_timeout_s):
                created.remove(force=True)
            raise

    def remove(self, found: Found, *, gently: bool = True) -> None:
        """Stop it, killing it if it lasts or at once, and remove it. Raises Unavailable."""
        with self._docker(self._settings.api_timeout_s) as client:
            try:
                if gently and found.running:
                    client.api.stop(found.id, timeout=STOP_S)
                client.api.remove_container(found.id, force=True)
            except APIError as error:
                # Somebody else removes it, or has.
                if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
                    raise
        logger.info("container %s is removed", self.name)

    def _start(self, created: Any) -> None:
        try:
            created.start()
        except APIError as error:
            hint = " Does this host have NVIDIA's container toolkit?" if "device driver" in _said(error) else ""
            raise StartFailed(f"Docker did not start the container {self.name}: {_said(error)}.{hint}") from error

    def _command(self, host: bool) -> list[str]:
        command = ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit"]
        command += [f"--{name.replace('_', '-')}={port}" for name, port in self._settings.ports.items()]
        if host:
            # Nothing is published then: Triton itself has to keep to the address.
            command += [
                f"--{name.removesuffix('_port')}-address={self._settings.listen}" for name in self._settings.ports
            ]
        return [*command, f"--exit-timeout-secs={EXIT_S}"]

    def _volumes(self) -> dict[str, dict[str, str]]:
        volumes = {str(self._settings.model_repository): {"bind": "/models", "mode": "rw"}}
        if self._settings.runtime is not None:
            volumes[str(self._settings.runtime)] = {"bind": "/runtime", "mode": "rw"}
        return volumes

    def _devices(self) -> list[DeviceRequest]:
        gpus = self._settings.gpus
        if gpus is None:
            return [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        return [DeviceRequest(device_ids=[str(gpu) for gpu in gpus], capabilities=[["gpu"]])] if gpus else []

    @contextlib.contextmanager
    def _docker(self, timeout_s: float) -> Iterator[Any]:
        """Docker's client, each of whose calls takes so long at most. Raises Unavailable if Docker is away."""
        try:
            yield self._connect(timeout_s)
        except APIError as error:
            raise Unavailable(f"Docker cannot do it: {_said(error)}.") from error
        except (requests.RequestException, DockerException, urllib3.exceptions.HTTPError, OSError) as error:
            where = self._settings.docker_url or "the environment's DOCKER_HOST or the usual socket"
            raise Unavailable(
                f"Docker does not answer ({where}): {_bottom(error)}. Is it running, and may this user reach it?"
            ) from error

    def _connect(self, timeout_s: float) -> Any:
        # Two threads may both make one: the second is kept, and the first lives as long as its caller needs it.
        if timeout_s not in self._clients:
            settings = {"timeout": timeout_s, "max_pool_size": CONNECTIONS}
            url = self._settings.docker_url
            self._clients[timeout_s] = (
                docker.DockerClient(base_url=url, **settings) if url else docker.from_env(**settings)
            )
        return self._clients[timeout_s]


class _Pull:
    """A pull on a thread of its own, since the SDK gives it no deadline."""

    def __init__(self, connect: Callable[[], Any], image: str) -> None:
        self.ended = threading.Event()
        self.heard_at = time.monotonic()
        self.problem: str | None = None
        self._connect = connect
        self._image = image
        threading.Thread(target=self._run, name="docker-pull", daemon=True).start()

    def _run(self) -> None:
        # A digest or a tag is part of the name; without one Docker would fetch every tag.
        tag = None if "@" in self._image or ":" in self._image.rpartition("/")[2] else "latest"
        try:
            for line in self._connect().api.pull(self._image, tag=tag, stream=True, decode=True):
                self.heard_at = time.monotonic()
                self.problem = line.get("error", self.problem)
        except APIError as error:
            self.problem = _said(error)
        except (requests.RequestException, DockerException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self.problem = _bottom(error)
        finally:
            self.ended.set()


def _said(error: BaseException) -> str:
    """Docker's own words."""
    return str(getattr(error, "explanation", None) or error)


def _bottom(error: BaseException) -> str:
    """The system's own words at the bottom of an exception, or else the exception's."""
    bottom = error
    while (below := bottom.__cause__ or bottom.__context__) is not None:
        bottom = below
    return (bottom.strerror if isinstance(bottom, OSError) else None) or str(bottom) or type(bottom).__name__
