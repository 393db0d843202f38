"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a file's text; whoever reads it sees the old text or the new one, after a power cut too.

    Raises OSError, having changed nothing: a full disk leaves the old text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it: only within one file system is the last step a single one.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; the container's user reads configurations, too.
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
