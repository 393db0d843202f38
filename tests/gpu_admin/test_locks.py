"""Locks between threads and processes."""

import os
import signal
from pathlib import Path

from gpu_admin import locks


def test_a_lock_is_between_threads_and_files_of_one_process_too(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"

    with locks.held(path), locks.if_free(path) as second:
        assert not second
    with locks.if_free(path) as mine, locks.if_free(path) as second:
        assert (mine, second) == (True, False)


def test_a_process_forked_meanwhile_does_not_keep_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with locks.held(path):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)

    try:
        with locks.if_free(path) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
