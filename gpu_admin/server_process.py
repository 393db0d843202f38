"""The process of one model server: its pid file, how it is started, found again after our own restart, and ended.

A server outlives the service that started it. Its pid file names it by pid, start time and boot id, so that a pid which
somebody else has by now is never taken for it; a mark in its environment finds it where there was no time to write the
pid down, and finds children that left its session.
"""

import dataclasses
import json
import logging
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_admin import locks, proc, whole_file
from gpu_admin.contract import Unavailable
from gpu_admin.server_log import ServerLog

logger = logging.getLogger(__name__)

MARK = "GPU_ADMIN_SERVER"
#: How long a killed process may take to go. One that waits for a driver goes later, or never.
KILL_S = 10.0
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started, as its pid file has it."""

    model: str
    gpu_ids: tuple[int, ...]
    port: int
    command: tuple[str, ...]
    boot_id: str
    #: In the environment of all its processes.
    token: str
    #: Its main process, which leads a session of its own; None until it is started.
    pid: int | None = None
    #: When that started, in clock ticks since boot.
    started: int | None = None
    #: When it first said that it serves, in unix seconds.
    ready_at: float | None = None
    #: How its main process ended, below zero for a signal; None while it lives, or where nobody knows.
    exit_code: int | None = None

    @property
    def mark(self) -> str:
        """What all its processes have in their environment."""
        return f"{MARK}={self.token}"

    def main(self) -> proc.Process | None:
        """Its main process while there is one, a zombie too; None once the pid is free or somebody else's."""
        if self.pid is None or self.boot_id != proc.boot_id():
            return None
        found = proc.look(self.pid)
        return found if found is not None and found.started == self.started else None

    def lives(self) -> bool:
        """Whether its main process runs."""
        main = self.main()
        return main is not None and not main.ended

    def processes(self) -> list[proc.Process]:
        """Its living processes: all of its session."""
        if self.pid is None or self.boot_id != proc.boot_id():
            return []
        members = proc.session(self.pid)
        if self.main() is None:
            # The session may be another one, whose leader got the same pid and has gone as well.
            return [member for member in members if proc.carries(member.pid, self.mark)]
        return members

    def all_processes(self) -> list[proc.Process]:
        """Those of its session and those that left it; looks at every process of this host."""
        return self.processes() or (proc.marked(self.mark) if self.boot_id == proc.boot_id() else [])

    def end(self, grace_s: float) -> frozenset[int]:
        """End all its processes, TERM and after the grace KILL; returns the pids that it had.

        Raises Unavailable if one is not gone KILL_S after that.
        """
        had: set[int] = set()
        for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
            told = set()
            until = time.monotonic() + seconds
            while living := self.all_processes():
                had |= {process.pid for process in living}
                for process in living:
                    if process not in told:
                        proc.send(process, number)
                        told.add(process)
                if time.monotonic() >= until:
                    break
                time.sleep(_LOOK_S)
            else:
                return frozenset(had)
        pids = ", ".join(str(process.pid) for process in living)
        raise Unavailable(
            f"Process {pids} of {self.model} does not end, although it was killed: it waits inside the system, "
            "usually for the GPU's driver."
        )


class PidFile:
    """Where a server is written down. Every process of this service may read and write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_suffix(".lock")

    def read(self) -> Server | None:
        """The server; None if there is none. One whose starter died before it could note the pid is found by its mark.

        Waits while it is being started, which takes milliseconds.
        """
        server = self._read()
        if server is None or server.pid is not None:
            return server
        with locks.held(self._lock):
            server = self._read()
            if server is None or server.pid is not None:
                return server
            leader = next((each for each in proc.marked(server.mark) if each.pid == each.session), None)
            return dataclasses.replace(server, pid=leader.pid, started=leader.started) if leader else server

    def note(self, token: str, **facts: Any) -> None:
        """Note fields of the server with that token, if it is still the one written down here. Raises OSError."""
        with locks.held(self._lock):
            server = self._read()
            if server is not None and server.token == token:
                self._write(dataclasses.replace(server, **facts))

    def remove(self) -> None:
        """Forget the server."""
        with locks.held(self._lock):
            self.path.unlink(missing_ok=True)

    def start(
        self,
        *,
        model: str,
        gpu_ids: tuple[int, ...],
        port: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        folder: Path | None,
        log: ServerLog,
    ) -> Server:
        """Start a server, which lives on without us; its output goes straight to the log.

        environ: its whole environment; folder: where it works. Raises OSError, having left nothing.
        """
        server = Server(model, gpu_ids, port, tuple(command), proc.boot_id(), secrets.token_hex(16))
        with locks.held(self._lock):
            # Written before it is started: whoever dies in between leaves the mark to find it by.
            self._write(server)
            try:
                output = log.open()
                try:
                    child = subprocess.Popen(  # noqa: S603 - the operator's settings, nothing of a request
                        server.command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        cwd=folder,
                        env={**environ, MARK: server.token},
                        start_new_session=True,
                    )
                finally:
                    os.close(output)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
            # Nobody but us can reap it, and nobody does until the thread below: it is there, if only as a zombie.
            started = proc.look(child.pid)
            assert started is not None
            server = dataclasses.replace(server, pid=child.pid, started=started.started)
            threading.Thread(target=self._await, args=(child, server), name=f"reaper-{child.pid}", daemon=True).start()
            try:
                self._write(server)
            except OSError:
                server.end(0)
                self.path.unlink(missing_ok=True)
                raise
        logger.info("started %s on GPU %s: pid %s, port %s", model, gpu_ids, server.pid, port)
        return server

    def _await(self, child: subprocess.Popen[bytes], server: Server) -> None:
        """Note how our child ended, for those who are not its parent, and reap it."""
        # Left to be reaped, so that whoever finds it gone finds the note.
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        logger.info("%s, pid %s: %s", server.model, server.pid, how_it_ended(code))
        try:
            self.note(server.token, exit_code=code)
        except OSError as error:
            logger.warning("how %s ended could not be noted: %s", server.model, error)
        child.wait()

    def _read(self) -> Server | None:
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
            return Server(**{**said, "gpu_ids": tuple(said["gpu_ids"]), "command": tuple(said["command"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            logger.error("%s cannot be read, and is ignored: %s", self.path, error)
            return None

    def _write(self, server: Server) -> None:
        whole_file.write(self.path, json.dumps(dataclasses.asdict(server), indent=1))


def how_it_ended(exit_code: int | None) -> str:
    """A clause for people: "it exited with code 1"."""
    if exit_code is None:
        return "it is gone"
    if exit_code >= 0:
        return f"it exited with code {exit_code}"
    try:
        name = f" ({signal.Signals(-exit_code).name})"
    except ValueError:
        name = ""
    return f"it was killed by signal {-exit_code}{name}"
