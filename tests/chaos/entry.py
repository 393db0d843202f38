"""How the harness starts a process of the platform: the product's own main(), watched.

    CHAOS_FOLDER=/tmp/x python -m tests.chaos.entry app.serve
    CHAOS_FOLDER=/tmp/x python -m tests.chaos.entry celery.__main__ -A tasks worker -Q asia-east.llm

A worker writes when it begins and ends a run, so that runs can be counted. The API has two points at which it dies if
the harness asked for it. CHAOS_WITHOUT names a guard to take out (guards.py).
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.chaos import guards

#: Files of the folder: every run, a line each; and what must stand in a job's params for the API to die at it.
RUNS = "runs.jsonl"
DIE_BEFORE_SEND = "die-before-send"
DIE_AFTER_SEND = "die-after-send"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the module that the first argument names."""
    # Not to outlive a harness that was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder = Path(os.environ["CHAOS_FOLDER"])
    if guard := os.environ.get("CHAOS_WITHOUT"):
        guards.take_out(guard)
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "app.serve":
        _add_failpoints(folder)
    elif sys.argv[0].startswith("celery"):
        _count_runs(folder / RUNS)
    if "FAKETIME" in os.environ:
        # libfaketime takes the monotonic clock's end of a sleep for one of the clock that it changes.
        time.sleep = lambda seconds: threading.Event().wait(seconds) and None
    importlib.import_module(sys.argv[0]).main()


def _count_runs(path: Path) -> None:
    from tasks.station import Station

    # Lines of several processes do not mix: each is one write that appends.
    out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    outcome = Station._outcome

    def note(what: str, run: Any) -> None:
        line = {"what": what, "at": time.monotonic(), "pid": os.getpid(), "job": run.job.id, "attempt": run.job.attempt}
        os.write(out, json.dumps(line).encode() + b"\n")

    def counted(self: Station, run: Any, claim: Any) -> Any:
        note("begin", run)
        try:
            return outcome(self, run, claim)
        finally:
            note("end", run)

    Station._outcome = counted  # type: ignore[method-assign]


def _add_failpoints(folder: Path) -> None:
    from app.dispatch import Dispatch

    send = Dispatch.send

    def die_if_asked(point: str, params: str | None) -> None:
        file = folder / point
        if file.exists() and file.read_text() in (params or ""):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def fragile(self: Dispatch, row: Any, params: str | None = None) -> Any:
        die_if_asked(DIE_BEFORE_SEND, params)
        # Marked as sent only some milliseconds later, by another thread.
        standing = send(self, row, params)
        die_if_asked(DIE_AFTER_SEND, params)
        return standing

    Dispatch.send = fragile  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
