"""Workers and servers as forks of a process that has imported their libraries once: a test run starts some hundreds.

What is run is `python -m celery -A tasks worker` or `python -m app.serve`, from its first line and in a process of its
own; only what it imports of other libraries, and what of ours reads no environment, is there already. That is most of
the second which a start takes from a core. What is started by the command itself: tests/test_journey.py,
tests/local/test_up.py and tests/tasks/test_launch.py.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "celery.bin.celery",
        "celery.apps.worker",
        "celery.backends.redis",
        "celery.concurrency.thread",
        "celery.worker.consumer",
        "kombu.transport.pyamqp",
        "kombu.transport.redis",
        "dotenv",
        "engines.echo",
        "engines.loading",
        "tasks.bootstrap",
        "tasks.channel",
        "tasks.consuming",
        "tasks.station",
        # For the API's server.
        "app",
        "waitress",
    ]
)


class Fork:
    """A process that runs a module, with what tests use of a subprocess.Popen."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, folder: Path, environ: Mapping[str, str], log: Path
    ) -> None:
        """As `python -m module arguments` in that folder, with that environment; log: what it prints, anew."""
        log.write_bytes(b"")
        self._lock = threading.Lock()
        self._process = _FORKS.Process(
            target=_run, args=(module, list(arguments), str(folder), dict(environ), str(log)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for the signal that ended it; nothing while it runs."""
        # The code can be read once, and threads may ask at the same time.
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once there is one. Raises subprocess.TimeoutExpired."""
        wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            # The server that forked it knows of its end before we do.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], folder: str, environ: dict[str, str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.environ.clear()
    os.environ.update(environ)
    time.tzset()
    os.chdir(folder)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # As every program does at its end, but for those of multiprocessing.
        atexit._run_exitfuncs()
