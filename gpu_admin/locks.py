"""Locks between threads and processes of one host: flock, which the system releases with whoever held it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of that file, waiting for it; shared with others who ask for it so."""
    with _opened(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def if_free(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of that file if nobody does, or none but those who share it; gives whether it is held now."""
    with _opened(path) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            try:
                yield True
            finally:
                # Closing the file alone does not let go while a process forked meanwhile (a server's worker) has it.
                fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each opening is a lock of its own, between threads of one process too. Python's files are not inherited by
    # children, which would hold the lock for as long as they live.
    with path.open("a") as file:
        yield file.fileno()
