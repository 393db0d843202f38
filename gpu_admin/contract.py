"""What every runner speaks: the Runner protocol, what ought to run, what is seen of it, and the errors.

HostError                   status and detail: translated once, at the HTTP edge
├── BadRequest              400, with the field and the rule
├── Refused                 403, this may not be done
├── NotFound                404
├── Conflict                409, not beside what is there now
├── NotSupported            501, this host cannot tell
└── Unavailable             503, something it needs is away
StartFailed                 raised by Runner.start() in the background: becomes the instance's ERROR and reason
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

#: What a model's name may be, the whole of it: a part of paths, of locks' names and of URLs.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


class InstanceStatus(StrEnum):
    """Where a model stands on a GPU."""

    #: Its server or its weights are being loaded.
    STARTING = "STARTING"
    #: The backend says that it answers.
    RUNNING = "RUNNING"
    #: It does not run, and its memory is back.
    STOPPED = "STOPPED"
    #: It ought to run and does not; the reason says why.
    ERROR = "ERROR"


@dataclass(frozen=True, slots=True)
class SupportedModel:
    """A model that a runner can start."""

    name: str
    #: Memory that it takes on each of its GPUs, in GiB; None where nobody stated it.
    memory_gib: float | None = None
    #: How many copies of it run on each GPU.
    instances_per_gpu: int = 1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that ought to run on a GPU, or on a set of them together."""

    model_name: str
    #: The first one is the GPU it was ordered for; more where one server spans several.
    gpu_ids: tuple[int, ...]
    #: As Runner.read_config returned it.
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpu_id(self) -> int:
        """The GPU it was ordered for."""
        return self.gpu_ids[0]

    @property
    def key(self) -> str:
        """Its name among files and locks; model names hold no slash."""
        return f"{self.model_name}@{self.gpu_id}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the backend, the processes and Docker say of a wanted model at this moment."""

    status: InstanceStatus
    #: Why it is in ERROR, or what else to know.
    reason: str | None = None
    #: The server's main process on this host.
    pid: int | None = None
    #: Where the server listens.
    port: int | None = None
    #: Every process of the server: those that hold its GPU memory are among them.
    pids: frozenset[int] = frozenset()
    #: Copies of the model that serve.
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """What a runner may use of its host."""

    #: A folder of its own, made when it is first needed: pid files, logs, locks.
    folder: Path
    #: Device memory in MiB that the processes hold on a GPU now; None where the host cannot tell.
    memory_mib: Callable[[int, frozenset[int]], float | None]


class Runner(Protocol):
    """Starts and stops one kind of model server. State is asked of the backend, never remembered.

    Built as Runner(section, place): section is its part of the settings, checked here; raises SettingsError.
    Several processes of this service may hold one runner each; what must not happen twice is guarded by file locks.
    """

    #: The `model_type` of its models: "triton".
    name: str
    #: What it can start, by name.
    models: Mapping[str, SupportedModel]

    def read_config(self, model_name: str, gpu_id: int, config: Mapping[str, Any]) -> Wanted:
        """The order for a supported model, from a request's `config`. Raises BadRequest for what it cannot mean."""

    def check(self, wanted: Wanted) -> None:
        """Look, within a second or two, at what would keep start() from working.

        Raises Unavailable for what is away (Docker), Conflict for what is taken (a port), BadRequest for what is
        missing or wrong (a template, a folder). Leaves nothing behind.
        """

    def start(self, wanted: Wanted, abandoned: Callable[[], bool]) -> None:
        """Bring it up; returns once it serves. What runs already is adopted, never started a second time.

        Called in the background by one thread of one process at a time for each wanted.key. Looks at abandoned() at
        least once a second and returns early, leaving the clearing up to stop(). Raises StartFailed, having ended what
        it started. Every call to the backend has a deadline.
        """

    def stop(self, wanted: Wanted) -> None:
        """Take it down; returns once it is gone and its GPU memory is back. Nothing to do is no error.

        Raises Unavailable if the backend does not answer.
        """

    def status(self, wanted: Wanted) -> Seen:
        """What is there now, within two seconds. STOPPED means nothing of it is; raises nothing."""

    def log(self, wanted: Wanted, tail: int) -> Sequence[str]:
        """The last lines that its server wrote, oldest first."""


class HostError(Exception):
    """A request that cannot be done, with the status and the sentence that answer it."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class BadRequest(HostError):
    """The request breaks a rule; the detail names the field and the rule."""

    status = HTTPStatus.BAD_REQUEST


class Refused(HostError):
    """This may not be done, or not by this caller."""

    status = HTTPStatus.FORBIDDEN


class NotFound(HostError):
    """There is no such thing here."""

    status = HTTPStatus.NOT_FOUND


class Conflict(HostError):
    """It cannot be done beside what is there now."""

    status = HTTPStatus.CONFLICT


class NotSupported(HostError):
    """This host lacks what it takes to answer."""

    status = HTTPStatus.NOT_IMPLEMENTED


class Unavailable(HostError):
    """Something that it needs does not answer."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class StartFailed(Exception):
    """A model did not come up; the reason is for people."""

    def __init__(self, reason: str, log: Sequence[str] = ()) -> None:
        """log: the last lines that its server wrote."""
        super().__init__(reason)
        self.reason = reason
        self.log = tuple(log)
