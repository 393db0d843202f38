"""What a region's store says of a job: of its record, its claim, its place and its queue (tasks/ledger.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from engines.contract import Progress
from tasks.job import DirectJob, Envelope


class Answer(StrEnum):
    """What begin() tells a worker that holds a message."""

    #: Run it: the attempt is yours.
    RUN = "RUN"
    #: It has an outcome already.
    DONE = "DONE"
    #: Its owner no longer wants it.
    CANCELLED = "CANCELLED"
    #: The message is of an older attempt, or of a job this store does not know.
    STALE = "STALE"
    #: A worker that is alive runs it.
    BUSY = "BUSY"
    #: It has been delivered too often: it may be what kills its workers.
    POISON = "POISON"


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to begin(); all but the answer itself with RUN only."""

    answer: Answer
    params: Mapping[str, Any]
    timeout_s: float
    #: What its outcome must carry.
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a queued job stands among those that wait for the same workers."""

    #: Jobs before it in its own queue, and in the queues beside it.
    before: int
    before_beside: int
    #: Jobs that run of its own queue, and of the queues beside it.
    running: int
    running_beside: int


@dataclass(frozen=True, slots=True)
class Entered:
    """The answer to put(): the record's state, where it stands if that is queued, and the store's epoch."""

    state: str
    epoch: str
    standing: Standing | None


@dataclass(frozen=True, slots=True)
class Queued:
    """One queue: how many of its jobs wait, the model it is for (None for any), and how many run."""

    depth: int
    model: str | None
    running: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """One queue: what waits, what runs, and how long it takes."""

    depth: int
    #: Seconds since each running job began, by the store's clock; the longest first.
    elapsed_s: Sequence[float]
    #: Running mean of a completed job's seconds; None until there was one.
    mean_s: float | None


@dataclass(frozen=True, slots=True)
class Record:
    """A job's live record as fold() needs it."""

    state: str
    attempt: int
    worker_id: str | None
    #: Unix seconds by the store's clock.
    started_at: float | None
    outcome: Envelope | None
    #: Set if its client brought it to the worker: then it may have no row yet.
    direct: DirectJob | None = None
    #: The outcome as it was found, for refuse().
    said: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """What a run says since it was last told: how far it has come, and the next entry of its job's stream."""

    job_id: str
    attempt: int
    progress: Progress | None
    number: int
    #: JSON text.
    entry: str
