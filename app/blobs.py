"""Params and results that are too large for a row: files in a folder, or whatever else fsspec reaches."""

import os
import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

#: Longest text that stays in its row, in characters.
INLINE_CHARS = 64 * 1024
#: What a row holds instead of a text that lies elsewhere; JSON never begins like this.
MARK = "blob:"
#: The folders that texts lie in, by the beginning of their keys.
FOLDERS = tuple(f"{number:02x}" for number in range(256))
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Blobs:
    """Texts by key. Raises OSError where the store does not answer, FileNotFoundError for what is not there."""

    def __init__(self, url: str) -> None:
        """url: a folder, or a URL of fsspec's, such as s3://bucket/prefix."""
        self._files: Any
        self._files, self._root = url_to_fs(url)

    def keep(self, text: str, job_id: str = "") -> str:
        """What to put into the row: the text, or where it lies now. A power cut does not take it away.

        job_id: whose it is; what says so is deleted by retention if no row comes to hold it (app/retention.py).
        """
        if len(text) <= INLINE_CHARS:
            return text
        key = f"{job_id}.{uuid.uuid4().hex[:8]}" if _JOB_ID.fullmatch(job_id) else uuid.uuid4().hex
        path = self._path(key)
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._files.open(path, "wb") as file:
            file.write(text.encode())
            if isinstance(self._files, LocalFileSystem):
                file.flush()
                os.fsync(file.fileno())
                _sync_folder(Path(path).parent)
        return MARK + key

    def read(self, kept: str) -> str:
        """The text that keep() was given."""
        if not kept.startswith(MARK):
            return kept
        text: str = self._files.cat_file(self._path(kept.removeprefix(MARK))).decode()
        return text

    def drop(self, kept: str) -> None:
        """Forget the text; the row is gone or never came to be. What cannot be deleted stays."""
        if kept.startswith(MARK):
            try:
                self._files.rm_file(self._path(kept.removeprefix(MARK)))
            except OSError:
                return

    def aged(self, folder: str, before: float) -> dict[str, str]:
        """Job ids by what their rows would hold: what lies in one of FOLDERS since before that time, in unix seconds.

        Texts that do not say whose they are, and those of a file system that tells no times, are left out.
        """
        # What was listed before may be remembered by the file system's client.
        self._files.invalidate_cache()
        try:
            found = self._files.ls(f"{self._root}/{folder}", detail=True)
        except FileNotFoundError:
            return {}
        keys = {entry["name"].rpartition("/")[2]: _modified(entry) for entry in found}
        return {
            MARK + key: key.partition(".")[0]
            for key, modified in keys.items()
            if "." in key and modified is not None and modified < before
        }

    def _path(self, key: str) -> str:
        # Two levels, since a folder of a million files is slow to list everywhere.
        return f"{self._root}/{key[:2]}/{key}"


def _modified(entry: Mapping[str, Any]) -> float | None:
    """When a file was written, in unix seconds: each file system of fsspec calls it by another name."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        moment = entry.get(name)
        if isinstance(moment, datetime):
            return moment.timestamp()
        if isinstance(moment, int | float):
            return float(moment)
    return None


def _sync_folder(folder: Path) -> None:
    """A new file's name is in its folder, which is written to the disk apart."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
