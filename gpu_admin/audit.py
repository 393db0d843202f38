"""Who changed what on this host: a file of JSON lines that several server processes append to."""

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_admin.locks import held

logger = logging.getLogger(__name__)

#: A file that would grow beyond is put aside as audit.log.1 and so on.
MAX_BYTES = 5_000_000
#: How many are kept aside; the oldest one goes.
KEPT = 5


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked."""

    #: The name of the key, never the key.
    key: str
    address: str


class Audit:
    """One line for each event: time, event, key, address and the event's own facts."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._lock = path.with_name(f"{path.name}.lock")
        self._max_bytes = max_bytes

    def record(self, event: str, caller: Caller, **facts: Any) -> None:
        """Append an event, and log it. Raises nothing: a disk that is full is logged as an ERROR with the line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        said = {"time": now, "event": event, "key": caller.key, "address": caller.address, **facts}
        line = json.dumps(said, default=str)
        logger.info("audit: %s", line)
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            logger.error("%s could not be written (%s); this event is not in it: %s", self._path, error, line)

    def _append(self, line: bytes) -> None:
        with held(self._lock):
            # Rather a file that is too large than a line that is lost.
            with contextlib.suppress(OSError):
                if self._path.stat().st_size + len(line) > self._max_bytes:
                    self._put_aside()
            # Opened each time: another process may have put it aside. For its owner alone: command lines are nobody
            # else's business.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(file).st_size
                if os.write(file, line) < len(line):
                    # No half line is left, to which the next one would be joined.
                    os.ftruncate(file, size)
                    raise OSError("the disk is full")
            finally:
                os.close(file)

    def _put_aside(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{number}") for number in range(1, KEPT + 1))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
