"""What a model server writes: one growing file, a few old ones, and its last lines."""

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from gpu_admin import locks

#: Characters of a line that are shown; the file has all of them.
LINE = 2_000
_BLOCK = 64 * 1024


class ServerLog:
    """The log of one server: NAME.log, and before it NAME.log.1, NAME.log.2."""

    def __init__(self, path: Path, max_bytes: int, old: int) -> None:
        """old: how many old files are kept."""
        self.path = path
        self._max_bytes = max_bytes
        self._old = old

    def open(self) -> int:
        """A descriptor of a new file that every write is appended to; what was written before becomes an old file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._size():
            self._shift()
            if self._old:
                self.path.replace(self._older(1))
        # Appending: after a truncation the server goes on at the new end, and leaves no hole.
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def rotate(self) -> None:
        """Make the file an old one if it is full.

        By copying and cutting to nothing, since a running server holds the file and would go on in a renamed one. What
        it writes between the two is lost.
        """
        if self._size() <= self._max_bytes:
            return
        with locks.if_free(self.path.with_suffix(".log.lock")) as free:
            if not free or self._size() <= self._max_bytes:
                return
            self._shift()
            if self._old:
                try:
                    shutil.copyfile(self.path, self._older(1))
                except OSError:
                    # A full disk: the old lines are worth less than the room.
                    self._older(1).unlink(missing_ok=True)
            os.truncate(self.path, 0)

    def tail(self, lines: int) -> list[str]:
        """The last lines, oldest first, each cut to LINE characters."""
        found: deque[str] = deque()
        for path in (self.path, *(self._older(number) for number in range(1, self._old + 1))):
            with contextlib.suppress(FileNotFoundError):
                for line in _backwards(path):
                    if len(found) == lines:
                        return list(found)
                    found.appendleft(line)
        return list(found)

    def last(self, lines: int) -> list[str]:
        """The last lines since the server was started; fewer if the file has just been rotated."""
        try:
            found = [line for line, _ in zip(_backwards(self.path), range(lines), strict=False)]
        except FileNotFoundError:
            return []
        return found[::-1]

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _shift(self) -> None:
        for number in range(self._old, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                self._older(number - 1).replace(self._older(number))

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def _backwards(path: Path) -> Iterator[str]:
    """A file's lines from its end, without reading more of it than is asked for."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        rest = b""
        first = True
        while at > 0:
            size = min(_BLOCK, at)
            at -= size
            file.seek(at)
            rest = file.read(size) + rest
            if first:
                rest = rest.removesuffix(b"\n")
                first = False
            (*whole,) = rest.split(b"\n")
            rest = whole[0]
            yield from (_shown(line) for line in reversed(whole[1:]))
        if not first:
            yield _shown(rest)


def _shown(line: bytes) -> str:
    # A progress bar writes itself over and over, each time from the line's begin.
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")[:LINE]
