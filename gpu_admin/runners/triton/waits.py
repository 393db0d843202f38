"""Waiting that ends: look() is called while something is waited for, and what it raises ends the wait."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpu_admin import locks

LOOK_S = 0.1

Look = Callable[[], None]


def deadline(seconds: float, error: Exception) -> Look:
    """A look that raises the error once so many seconds have passed from now."""
    end = time.monotonic() + seconds

    def look() -> None:
        if time.monotonic() > end:
            raise error

    return look


@contextmanager
def turn(path: Path, look: Look, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of that file, looking about until it is free."""
    while True:
        with locks.if_free(path, shared=shared) as mine:
            if mine:
                yield
                return
        look()
        time.sleep(LOOK_S)
