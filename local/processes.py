"""Child processes that are started, heard and stopped together.

Each leads a session of its own, so that a terminal's Ctrl-C reaches the parent alone, which stops them in order. On
Linux the kernel kills them when the parent is gone, however that ended; elsewhere the next start finds them by their
pid files.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from local import pidfiles
from tasks.lifeline import die_with
from tasks.settings import ROOT

#: Called with (process name, line), one call at a time.
Hear = Callable[[str, str], None]

#: Lines that are kept to explain why a process ended.
TAIL_LINES = 25


class ProcessEnded(Exception):
    """A process ended that should not have; the message says which, how, and what it said last."""


class Process:
    """One child and the last lines it said. Start it from the main thread: on Linux it dies with that thread."""

    def __init__(self, name: str, command: str, environ: Mapping[str, str], hear: Hear) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        parent = os.getpid()
        # With exec the shell, which a Procfile counts on for its variables, becomes the command.
        self._child = subprocess.Popen(  # noqa: S602 - and the command comes from our Procfile
            f"exec {command}",
            shell=True,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        self._reader = threading.Thread(target=self._read, args=(hear,), name=f"read-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id, and that of its process group."""
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._child.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code, once it has ended and been heard out. Raises subprocess.TimeoutExpired."""
        code = self._child.wait(timeout_s)
        # A grandchild may hold the pipe open; it is not waited for.
        self._reader.join(timeout=1)
        return code

    def obituary(self) -> str:
        """How it ended, and what it said last."""
        said = "".join(f"\n    {line}" for line in self.tail) or " nothing."
        return f"{self.name} ended with exit code {self.exit_code}. It said last:{said}"

    def _read(self, hear: Hear) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.tail.append(line.rstrip())
            hear(self.name, line.rstrip())


class Processes:
    """The children of one run, by name."""

    def __init__(self, run_dir: Path, environ: Mapping[str, str], hear: Hear) -> None:
        self._run_dir = run_dir
        self._environ = environ
        self._hear = hear
        self._turn = threading.Lock()
        self._running: dict[str, Process] = {}

    def start(self, name: str, command: str) -> Process:
        """Start a process and note its pid."""
        process = self._running[name] = Process(name, command, self._environ, self._hear_one)
        pidfiles.write(self._note(name), process.pid)
        return process

    def run(self, name: str, command: str) -> None:
        """Start a process and wait until it has done its work. Raises ProcessEnded unless it did."""
        process = self.start(name, command)
        code = process.wait()
        self._forget(name)
        if code:
            raise ProcessEnded(process.obituary())

    def ended(self) -> Process | None:
        """One that has ended by itself, if there is one; it is no longer ours."""
        for name, process in self._running.items():
            if process.exit_code is not None:
                process.wait()
                # What it had started goes with it.
                process.signal(signal.SIGKILL)
                self._forget(name)
                return process
        return None

    def stop(self, last: str, grace_s: float) -> None:
        """End all: `last` after the others, which may need it to end well; who exceeds the grace is killed."""
        try:
            self._terminate([name for name in self._running if name != last], grace_s)
            self._terminate(list(self._running), grace_s)
        finally:
            self._kill()

    def _terminate(self, names: Iterable[str], grace_s: float) -> None:
        processes = [self._running[name] for name in names]
        end = time.monotonic() + grace_s
        for process in processes:
            process.signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                self._hear_one(process.name, f"did not end within {grace_s:g} s and is killed")
            process.signal(signal.SIGKILL)
            process.wait()
            self._forget(process.name)

    def _kill(self) -> None:
        for name, process in list(self._running.items()):
            process.signal(signal.SIGKILL)
            process.wait()
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._running[name]
        self._note(name).unlink(missing_ok=True)

    def _note(self, name: str) -> Path:
        return self._run_dir / f"{name}.pid"

    def _hear_one(self, name: str, line: str) -> None:
        with self._turn:
            self._hear(name, line)
