"""What crosses a process line: the Job in a message, the Envelope that comes back, and the states of both."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from engines.catalogue import JobType

#: How often a job is tried before it fails with worker_lost; a job that kills its worker stops here.
MAX_ATTEMPTS = 3


class JobState(StrEnum):
    """Where a job stands. States only climb: queued, running, then one of the ends."""

    #: Accepted; waits for a worker.
    QUEUED = "queued"
    #: A worker has begun it.
    RUNNING = "running"
    #: Ended with a result.
    COMPLETED = "completed"
    #: Ended with an error.
    FAILED = "failed"
    #: Ended because its owner asked.
    CANCELLED = "cancelled"
    #: Ended because it waited or ran longer than it may.
    TIMEOUT = "timeout"


LIVE = (JobState.QUEUED, JobState.RUNNING)
TERMINAL = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMEOUT)


@dataclass(frozen=True, slots=True)
class Job:
    """The message of one attempt. Params travel in the store, never here: messages show up in Flower and logs."""

    id: str
    type: JobType
    #: 1 for the first try; together with the worker that begins it, the fence for every later write.
    attempt: int

    @property
    def task_name(self) -> str:
        """One Celery task name per job type, so that Flower can tell them apart."""
        return f"tasks.{self.type}"

    def to_args(self) -> tuple[str, int]:
        """The task's positional arguments; the type is the task's name."""
        return (self.id, self.attempt)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job did not complete: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a worker says became of one attempt."""

    job_id: str
    attempt: int
    worker_id: str
    region: str
    outcome: JobState
    #: Seconds the attempt ran, by the worker's monotonic clock.
    run_s: float
    result: Mapping[str, Any] | None = None
    error: JobError | None = None
    #: What the attempt was handed out with; without the right one nobody believes the rest.
    ticket: str = ""

    def encode(self) -> str:
        """As JSON text."""
        return _encode(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> "Envelope":
        """The envelope that encode() wrote."""
        fields = json.loads(text)
        fields["outcome"] = JobState(fields["outcome"])
        if fields["error"] is not None:
            fields["error"] = JobError(**fields["error"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class DirectJob:
    """A job that its client brought to the worker: what its row will say, which is made of it afterwards."""

    owner: str
    type: JobType
    #: The model it had to have, as the catalogue and as its client calls it; None for any.
    model: str | None
    requested_model: str | None
    priority: int
    region: str
    #: The region that its client named.
    region_wanted: str | None
    allow_cross_region: bool
    timeout_seconds: float
    #: The one that its token carries.
    ticket: str = ""

    def encode(self) -> str:
        """As JSON text."""
        return _encode(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "DirectJob":
        """The job that encode() wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "type": JobType(fields["type"])})


def _encode(fields: dict[str, Any]) -> str:
    # An API of before there were tickets knows no such field, and hands none out.
    if not fields["ticket"]:
        del fields["ticket"]
    return json.dumps(fields, separators=(",", ":"))


class JobFailed(Exception):
    """The job failed and that has been recorded; raised only so that Flower shows a failure."""
