"""Notes of what runs, one file per process, by which the next start finds what a hard kill has left behind."""

import json
import os
from pathlib import Path

import psutil

#: How long a leftover may take to end by itself before it is killed.
TERM_GRACE_S = 5.0
#: Two readings of one process's start time differ by less.
_SAME_START_S = 1.0


def write(path: Path, pid: int) -> None:
    """Note that the process runs; with its start time, since the system gives pids out again."""
    process = psutil.Process(pid)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": pid, "started": process.create_time(), "parent": process.ppid()}))


def orphan(path: Path) -> psutil.Process | None:
    """The process that was noted, if it still runs while the one that started it does not."""
    try:
        note = json.loads(path.read_text())
        process = psutil.Process(note["pid"])
        same = abs(process.create_time() - note["started"]) < _SAME_START_S
        return process if same and process.ppid() != note["parent"] and process.pid != os.getpid() else None
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def end_orphan(path: Path) -> int | None:
    """End the orphan that was noted there, if there is one; its pid."""
    process = orphan(path)
    if process is None:
        return None
    try:
        process.terminate()
        process.wait(TERM_GRACE_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(TERM_GRACE_S)
    except psutil.NoSuchProcess:
        pass
    path.unlink(missing_ok=True)
    return int(process.pid)
