"""Weights that their publishers give as a pickle alone: a file is read if its SHA-256 is a known one."""

import hashlib
from collections.abc import Collection
from pathlib import Path


def check(file: Path, known: Collection[str], whose: str) -> None:
    """Pass a known file: weights_only is a fence around pickle, and fences have had holes.

    known: SHA-256 in hex. whose: what those files are, for people. Raises ValueError for any other file, and OSError.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found not in known:
        raise ValueError(
            f"{file.name} is none of {whose} (its sha256 is {found}), and a {file.suffix} file is a pickle, which can "
            "run code as it is read. Convert it once, where you trust it, to model.safetensors."
        )
