"""Ends processes of this host: those that hold GPU memory or that this service started, and no others.

A pid says little: between a look and a signal it may have become another process. So the process is pinned by a pidfd
before anything is checked, and every signal goes there.
"""

import contextlib
import errno
import logging
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from gpu_admin.audit import Audit, Caller
from gpu_admin.contract import BadRequest, Conflict, HostError, NotFound, NotSupported, Refused
from gpu_admin.gpus import Gpus

logger = logging.getLogger(__name__)

#: How long a process may take to end once it has been killed: the driver gives its memory back first.
KILLED_S = 10.0
#: The largest number that the system takes for a pid.
MAX_PID = 2**31 - 1
#: How much of a command line is kept.
COMMAND_LENGTH = 500
#: Start times are told by the boot time, which moves with the clock's corrections; clients may round to seconds.
STARTED_WITHIN_S = 2.0
#: What follows such an option or variable is nobody's business: --api-key X, HF_TOKEN=X.
_SECRET = re.compile(r"(?i)(?<!\S)(--?[\w-]*(?:key|token|password|secret)[= ]|\w*(?:key|token|password|secret)=)\S+")


@dataclass(frozen=True, slots=True)
class Killed:
    """A process that is gone."""

    pid: int
    name: str
    #: Its command line, cut, without secrets.
    command: str


@dataclass(frozen=True, slots=True)
class _Process:
    """A process while it is pinned."""

    pid: int
    pidfd: int
    name: str
    command: str
    #: Unix seconds.
    started_at: float


class Processes:
    """The processes that may be ended here."""

    def __init__(
        self,
        gpus: Gpus,
        ours: Callable[[], frozenset[int]],
        audit: Audit,
        grace_s: float = 5.0,
        killed_s: float = KILLED_S,
    ) -> None:
        """ours: the pids of all that this service started.

        grace_s, killed_s: how long a process may take to end after SIGTERM, and then after SIGKILL.
        """
        self._gpus = gpus
        self._ours = ours
        self._audit = audit
        self._grace_s = grace_s
        self._killed_s = killed_s

    def kill(self, pid: int, caller: Caller, started_at: float | None = None) -> Killed:
        """End a process, by SIGTERM and after a while SIGKILL; returns once it is gone. Each call goes into the audit.

        started_at: unix seconds, as Gpus.read tells; a process of another age is left alone.
        Raises BadRequest for what is no pid, NotFound, Conflict if the pid has been reused, Refused for what may not be
        ended, NotSupported if nobody can tell whether it holds GPU memory, HostError for one that does not die.
        """
        facts: dict[str, object] = {"pid": pid}
        try:
            with _pinned(pid) as process:
                facts.update(name=process.name, command=process.command)
                self._check(process, started_at)
                facts["signal"] = self._end(process)
        except HostError as error:
            event = "process.survived" if isinstance(error, _Survived) else "process.refused"
            self._audit.record(event, caller, **facts, status=int(error.status), reason=error.detail)
            raise
        self._audit.record("process.killed", caller, **facts)
        return Killed(process.pid, process.name, process.command)

    def _check(self, process: _Process, started_at: float | None) -> None:
        pid = process.pid
        if started_at is not None and abs(process.started_at - started_at) > STARTED_WITHIN_S:
            raise Conflict(
                f"Process {pid} started at {process.started_at:.2f}, not at {started_at:.2f}: "
                "the pid has been reused. Ask for the GPUs again."
            )
        if pid == 1:
            raise Refused("Process 1 is the system's first one and cannot be ended here.")
        if pid == os.getpid() or pid in _family():
            raise Refused(f"Process {pid} ({process.name}) belongs to this service: stop the service by its own means.")
        if pid in self._ours():
            return
        gpus = self._gpus.read()
        if any(pid == held.pid for gpu in gpus for held in gpu.processes):
            return
        unread = "".join(f" GPU {gpu.id} could not be read whole: {gpu.error}." for gpu in gpus if gpu.error)
        raise Refused(
            f"Process {pid} ({process.name}) holds no GPU memory and was not started here: "
            f"only such processes can be ended.{unread}"
        )

    def _end(self, process: _Process) -> str:
        """The name of the signal that ended it."""
        for number, seconds in ((signal.SIGTERM, self._grace_s), (signal.SIGKILL, self._killed_s)):
            try:
                signal.pidfd_send_signal(process.pidfd, number)
            except ProcessLookupError:
                # Between two signals: the first one did it, and a little late.
                if number == signal.SIGTERM:
                    raise _gone(process.pid) from None
                return signal.SIGTERM.name
            except PermissionError:
                raise Refused(
                    f"Process {process.pid} ({process.name}) belongs to another user: this service may not end it."
                ) from None
            if _ended(process.pidfd, seconds):
                logger.info("process %d (%s) ended by %s", process.pid, process.name, number.name)
                return number.name
        raise _Survived(
            f"Process {process.pid} ({process.name}) has not ended within {self._killed_s:g} s after SIGKILL; "
            f"its status is {_status(process.pid)}. It ends when the system call that holds it returns."
        )


class _Survived(HostError):
    """A process was killed and is still there."""


@contextmanager
def _pinned(pid: int) -> Iterator[_Process]:
    """The process that has this pid now, and still after it has been looked at."""
    if isinstance(pid, bool) or not isinstance(pid, int) or not 1 <= pid <= MAX_PID:
        raise BadRequest(f"pid: must be an integer from 1 to {MAX_PID}.")
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise _gone(pid) from None
    except OSError as error:
        # What has a number and is no process is a thread; which error says so depends on the kernel.
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise NotFound(f"{pid} is no process but a thread of one.") from None
        if error.errno == errno.ENOSYS:
            raise NotSupported("Processes cannot be ended safely here: this needs Linux 5.3 or newer.") from None
        raise HostError(f"Process {pid} cannot be opened: {error.strerror}.") from error
    try:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                name, started_at = process.name(), process.create_time()
            command = _command(process)
        except psutil.Error:
            raise _gone(pid) from None
        # All of this was its own only if it is still there.
        if _ended(pidfd, 0):
            raise _gone(pid)
        yield _Process(pid, pidfd, name, command, started_at)
    finally:
        os.close(pidfd)


def _gone(pid: int) -> NotFound:
    return NotFound(f"There is no process {pid}: it never was, or it has ended.")


def _ended(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within that time. One that only waits for its parent has ended: it holds nothing."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _command(process: psutil.Process) -> str:
    """A command line, cut and without secrets; a kernel thread has none, nor has one of which only threads go on."""
    try:
        command = " ".join(process.cmdline())
    except (psutil.AccessDenied, psutil.ZombieProcess):
        return ""
    return _SECRET.sub(r"\1***", command)[:COMMAND_LENGTH]


def _family() -> frozenset[int]:
    """What this service hangs on: our parents, and the other server processes of our parent."""
    own = psutil.Process()
    family: set[int] = set()
    with contextlib.suppress(psutil.Error):
        parents = own.parents()
        family.update(parent.pid for parent in parents)
        # Forked from one program as we are. What else our parent runs, such as a Procfile's workers, is not ours.
        command = own.cmdline()
        for sibling in parents[0].children() if parents else ():
            with contextlib.suppress(psutil.Error):
                if sibling.cmdline() == command:
                    family.add(sibling.pid)
    return frozenset(family)


def _status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "unknown"
