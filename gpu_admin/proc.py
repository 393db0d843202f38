"""This host's processes, as /proc tells of them."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process at the moment it was looked at."""

    pid: int
    #: When it started, in clock ticks since the host's boot: with pid and boot id it names one process for ever.
    started: int
    #: The session that it belongs to: the pid of the process that opened it.
    session: int
    #: It has ended and only waits for its parent to ask: a zombie.
    ended: bool
    #: Of one that has ended: its exit code, below zero for a signal; None where the system does not tell us.
    exit_code: int | None


def look(pid: int) -> Process | None:
    """The process of that pid; None if there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in brackets, and may itself hold brackets and blanks.
    values = text.rpartition(")")[2].split()
    ended = values[0] in ("Z", "X")
    status = int(values[49]) if ended else 0
    # Zero is also what those are told who may not know.
    return Process(pid, int(values[19]), int(values[3]), ended, os.waitstatus_to_exitcode(status) if status else None)


def session(leader: int) -> list[Process]:
    """The living processes of the session that this pid opened, itself among them."""
    return [
        process
        for pid in _pids()
        if _session(pid) == leader and (process := look(pid)) is not None and not process.ended
    ]


def marked(mark: str) -> list[Process]:
    """The living processes that were started with NAME=VALUE in their environment, as far as we may look."""
    found = []
    for pid in _pids():
        if carries(pid, mark) and (process := look(pid)) is not None and not process.ended:
            found.append(process)
    return found


def carries(pid: int, mark: str) -> bool:
    """Whether a process was started with NAME=VALUE in its environment."""
    try:
        return mark.encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def listens(pids: Iterable[int], port: int) -> bool:
    """Whether one of these processes accepts connections on a TCP port."""
    for pid in pids:
        try:
            connections = psutil.Process(pid).net_connections("tcp")
        except psutil.Error:
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections):
            return True
    return False


def send(process: Process, number: int) -> None:
    """Send a signal to exactly this process, or to none if it is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor came first: what it names cannot change between this look and the signal.
        found = look(process.pid)
        if found is not None and found.started == process.started:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """A name of the time since this host's last boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _pids() -> Iterator[int]:
    return iter(psutil.pids())


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None
