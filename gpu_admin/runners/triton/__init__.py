"""Models in NVIDIA's Triton Inference Server, all of them in one container.

The container comes with the first model and goes after the last, since only then all its memory is back. Where a model
is, Triton says itself; nothing is remembered here. Who changes what is settled by file locks, taken in this order:
model-<name>.lock for one change of a model's placement at a time, then those of tenancy.py.
"""

import errno
import logging
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_admin.contract import (
    BadRequest,
    Conflict,
    HostError,
    InstanceStatus,
    Place,
    Seen,
    StartFailed,
    SupportedModel,
    Unavailable,
    Wanted,
)
from gpu_admin.runners.triton.container import Container, Found
from gpu_admin.runners.triton.loads import Loads, message
from gpu_admin.runners.triton.placement import ModelFolder
from gpu_admin.runners.triton.repository import QUICK_S, IndexEntry, ModelState, NoAnswer, Repository
from gpu_admin.runners.triton.settings import MOST_COPIES, TritonSettings
from gpu_admin.runners.triton.tenancy import Tenancy
from gpu_admin.runners.triton.waits import LOOK_S, deadline, turn
from gpu_admin.settings import near

logger = logging.getLogger(__name__)

#: How long to wait until memory that a model held is free.
MEMORY_S = 5.0
MOST_REASON = 1000
CONFIG_KEYS = ("instances_per_gpu",)


class Runner:
    """Places models on GPUs inside the Triton container."""

    name = "triton"

    def __init__(self, section: Mapping[str, Any], place: Place) -> None:
        """Raises SettingsError."""
        self._settings = TritonSettings.from_section(section)
        self._place = place
        self._container = Container(self._settings)
        self._repository = Repository(self._settings.address, self._settings.port)
        self._tenancy = Tenancy(self._settings, self._container, self._repository, place.folder)
        self._loads = Loads(self._settings, self._container, self._repository)
        self.models: Mapping[str, SupportedModel] = self._settings.supported

    def read_config(self, model_name: str, gpu_id: int, config: Mapping[str, Any]) -> Wanted:
        """The order. config may have instances_per_gpu, in place of the setting. Raises BadRequest."""
        for key in config:
            if key not in CONFIG_KEYS:
                raise BadRequest(
                    f"config.{key}: there is no such key for a Triton model, only {', '.join(CONFIG_KEYS)}."
                    f"{near(str(key), CONFIG_KEYS)}"
                )
        stated = self._settings.model(model_name).instances_per_gpu
        copies = config.get("instances_per_gpu", stated)
        if isinstance(copies, bool) or not isinstance(copies, int) or not 1 <= copies <= MOST_COPIES:
            raise BadRequest(f"config.instances_per_gpu: must be a whole number from 1 to {MOST_COPIES}.")
        self._loads.groups(model_name, {gpu_id: copies})
        return Wanted(model_name, (gpu_id,), {} if copies == stated else {"instances_per_gpu": copies})

    def check(self, wanted: Wanted) -> None:
        """Look at the model's folder, Docker, the container's name and its ports. Raises HostError."""
        groups = self._loads.groups(wanted.model_name, {wanted.gpu_id: self._copies(wanted)})
        ModelFolder(self._settings.model_repository, wanted.model_name).check(groups)
        found = self._container.look()
        if found is None or not found.running:
            self._tenancy.check_name(found)
            self._check_runtime()
            self._check_ports()

    def start(self, wanted: Wanted, abandoned: Callable[[], bool]) -> None:
        """Load the model onto the GPU, into a container that is made if there is none. Raises StartFailed."""

        def look() -> None:
            if abandoned():
                raise _Abandoned

        try:
            with turn(self._turn_of(wanted), look):
                try:
                    with self._tenancy.running(look):
                        self._loads.put(wanted.model_name, wanted.gpu_id, self._copies(wanted), look)
                except (StartFailed, HostError, NoAnswer) as error:
                    log = self._container.log_end()
                    self._tenancy.end_after_failure(wanted.model_name)
                    raise StartFailed(_shortened(message(error)), log) from error
        except _Abandoned:
            logger.info("the start of %s is abandoned", wanted.key)

    def stop(self, wanted: Wanted) -> None:
        """Take the model from the GPU, and the container away if nothing else is in it. Raises Unavailable."""
        name, seconds = wanted.model_name, self._settings.load_timeout_s
        late = Unavailable(f"Triton still works on {name} for another GPU after {seconds:.0f} s.")
        with turn(self._turn_of(wanted), deadline(seconds, late)):
            found = self._container.look()
            if found is None:
                return
            pids = self._container.pids(found) if found.running else frozenset()
            before = self._place.memory_mib(wanted.gpu_id, pids)
            hangs = False
            if found.running:
                try:
                    hangs = not self._loads.take(name, wanted.gpu_id)
                except NoAnswer as error:
                    # A server that does not listen has loaded nothing yet, or is ending.
                    if not error.refused:
                        raise Unavailable(f"{error} Look at the log of container {self._container.name}.") from error
            self._tenancy.end(name if hangs else None)
            self._wait_for_memory(wanted.gpu_id, pids, before)

    def status(self, wanted: Wanted) -> Seen:
        """What Docker and Triton say of it, both asked at once."""
        with ThreadPoolExecutor(1, "docker-status") as pool:
            looking = pool.submit(self._look_inside)
            entry, copies, silence = self._ask(wanted)
            found, pids, docker_silence = looking.result()
        if docker_silence is None and (found is None or not found.running):
            return self._without_container(found)
        if silence is not None:
            status, reason = InstanceStatus.ERROR, " ".join(filter(None, (silence, docker_silence)))
        elif entry.state is ModelState.READY and copies:
            # Triton itself says that it serves: Docker need not.
            status, reason = InstanceStatus.RUNNING, docker_silence or ""
        elif entry.state is ModelState.LOADING:
            status, reason = InstanceStatus.STARTING, docker_silence or ""
        else:
            return Seen(InstanceStatus.STOPPED, _shortened(entry.reason) if entry.reason else None)
        return Seen(
            status,
            reason or None,
            pid=found.pid if found else None,
            port=self._settings.port,
            pids=pids,
            copies=copies or self._copies(wanted),
        )

    def log(self, wanted: Wanted, tail: int) -> list[str]:
        """The container's last lines; it is shared by all models, and its log goes with it. Raises Unavailable."""
        return self._container.log(tail)

    def _turn_of(self, wanted: Wanted) -> Path:
        return self._place.folder / f"model-{wanted.model_name}.lock"

    def _copies(self, wanted: Wanted) -> int:
        return int(wanted.config.get("instances_per_gpu", self._settings.model(wanted.model_name).instances_per_gpu))

    def _check_runtime(self) -> None:
        # Docker would make a missing folder, owned by root.
        if self._settings.runtime is not None and not self._settings.runtime.is_dir():
            raise BadRequest(
                f"{self._settings.runtime} is no folder. Set triton.runtime_host_path, or null for no such folder."
            )

    def _check_ports(self) -> None:
        for name, port in self._settings.ports.items():
            taken = _why_not_free(self._settings.listen, port)
            if taken is None:
                continue
            found = self._container.look()
            if found is not None and found.status in ("created", "running"):
                # It was made meanwhile, and it is its port.
                return
            raise Conflict(
                f"Port {port} of {self._settings.listen} cannot be used: {taken}. Stop what listens there, or set "
                f"triton.{name} (triton.listen for the address)."
            )

    def _wait_for_memory(self, gpu_id: int, pids: frozenset[int], before: float | None) -> None:
        """Until the processes hold less on that GPU than before, if they held anything; a few seconds at most."""
        end = time.monotonic() + MEMORY_S
        while before and time.monotonic() < end:
            now = self._place.memory_mib(gpu_id, pids)
            if now is None or now < before:
                return
            time.sleep(LOOK_S)
        if before:
            logger.warning("Triton still holds %.0f MiB of GPU %d", before, gpu_id)

    def _ask(self, wanted: Wanted) -> tuple[IndexEntry, int, str | None]:
        """The model in Triton's index, and its copies on the GPU; if Triton does not say, why."""
        entry, copies = IndexEntry(), 0
        try:
            entry = self._repository.index(QUICK_S).get(wanted.model_name, entry)
            if entry.state is ModelState.READY:
                copies = self._loads.placed(wanted.model_name, QUICK_S).get(wanted.gpu_id, 0)
        except NoAnswer as error:
            return entry, 0, str(error)
        return entry, copies, None

    def _look_inside(self) -> tuple[Found | None, frozenset[int], str | None]:
        """The container and its processes; if Docker does not say, why."""
        try:
            found = self._container.look()
            pids = self._container.pids(found) if found is not None and found.running else frozenset()
        except Unavailable as error:
            return None, frozenset(), error.detail
        return found, pids, None

    def _without_container(self, found: Found | None) -> Seen:
        if self._tenancy.is_fetching():
            return Seen(InstanceStatus.STARTING, f"Docker fetches the image {self._settings.image_name}.")
        if found is None or found.status == "created":
            return Seen(InstanceStatus.STOPPED)
        return Seen(InstanceStatus.ERROR, f"The container {self._container.name} {found.end}.")


class _Abandoned(Exception):
    """Nobody waits for this start any more."""


def _why_not_free(address: str, port: int) -> str | None:
    """Why nobody could listen there, in the system's words; None if somebody could."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        # Connections that ended lately do not keep a server from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            # Ports below 1024 are Docker's to open, and not this user's.
            return None if error.errno == errno.EACCES else str(error.strerror)
    return None


def _shortened(reason: str) -> str:
    reason = reason.strip()
    return reason if len(reason) <= MOST_REASON else f"{reason[:MOST_REASON]} …"
