"""What every engine speaks: the Engine protocol, the reports it makes, the errors it raises.

EngineError                 carries code and message; translated once, by the task
├── EngineLoadError         the engine cannot be loaded: the worker stops and says this
│   └── ServerAway          the server that it needs does not answer: started again later, the worker may serve
├── InvalidInput            the job's own fault: that job fails, nothing is retried
├── OutOfMemory             the job does not fit beside what runs: that job fails
└── EngineBroken            no job can run here any more: jobs are given back, the worker restarts
JobInterrupted              not an error: report() raises it to stop one job
├── JobCancelled            its owner no longer wants it
├── JobTimedOut             it ran longer than its timeout_seconds
└── JobReleased             this worker may not go on with it; another one will
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

GIB = 2**30
#: What an engine may compute in, by torch's names.
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Device:
    """Where an engine computes, and what it may use there."""

    #: As torch names it: "cpu", "cuda:0".
    name: str
    #: "auto" lets the engine take the fastest one the device has kernels for.
    dtype: str = "auto"
    #: Cap on the device's memory; None is all that is free.
    max_memory_gib: float | None = None
    #: Move weights to host memory when they do not fit.
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one job has come: done of total units ("token", "step", "second", "node").

    A unit that is partly done may be counted as such: 3.4 of 7 nodes.
    """

    done: float
    total: int | None
    unit: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text that was added to an answer since the last report."""

    delta: str
    #: Which of the answers, where a job asks for several.
    choice: int = 0
    #: For each token of the text, as LlmResult has them; empty unless the job asks for them.
    logprobs: Sequence[Mapping[str, Any]] = ()


#: Called by an engine at every step of a job, from any thread; raises JobInterrupted to stop that job.
Report = Callable[[Progress | Text], None]


class Engine(Protocol):
    """A loaded model that answers one job type. An Engine that exists is loaded and warm."""

    #: How many jobs may be inside run() at once.
    slots: int

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """The result for validated params; called from up to `slots` threads at once.

        Raises InvalidInput, OutOfMemory or EngineBroken, and whatever JobInterrupted report() raised.
        """

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""


@runtime_checkable
class Batching(Protocol):
    """An engine that can say how many jobs it computes together."""

    @property
    def batch(self) -> int:
        """How many that are now; any thread may ask."""


class EngineError(Exception):
    """A failure with a stable code for programs and a message for people."""

    code = "engine_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class EngineLoadError(EngineError):
    """The engine cannot be loaded; the message says which, why, and what to set."""

    code = "engine_load_error"


class ServerAway(EngineLoadError):
    """The server of the host that computes for the engine cannot be reached."""

    code = "server_away"


class InvalidInput(EngineError):
    """The params are well formed, but this model cannot take them."""

    code = "invalid_input"


class OutOfMemory(EngineError):
    """The job needs more memory than the device has left."""

    code = "out_of_memory"


class EngineBroken(EngineError):
    """The engine or its device is unusable until the process is started again.

    Its message is logged and told to every job of the engine: it holds the device's or a server's words, no client's.
    """

    code = "engine_broken"


class JobInterrupted(Exception):
    """Raised by report() to stop one job; engines let it through to the caller of run()."""


class JobCancelled(JobInterrupted):
    """The job was cancelled."""


class JobTimedOut(JobInterrupted):
    """The job ran longer than its timeout_seconds."""


class JobReleased(JobInterrupted):
    """The job goes back to the queue: this worker drains, or lost its claim on the job."""
