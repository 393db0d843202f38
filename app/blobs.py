"""Params and results that are too large for a row: files in a folder, or whatever else fsspec reaches."""

import os
import uuid
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

#: Longest text that stays in its row, in characters.
INLINE_CHARS = 64 * 1024
#: What a row holds instead of a text that lies elsewhere; JSON never begins like this.
_MARK = "blob:"


class Blobs:
    """Texts by key. Raises OSError where the store does not answer, FileNotFoundError for what is not there."""

    def __init__(self, url: str) -> None:
        """url: a folder, or a URL of fsspec's, such as s3://bucket/prefix."""
        self._files: Any
        self._files, self._root = url_to_fs(url)

    def keep(self, text: str) -> str:
        """What to put into the row: the text, or where it lies now. A power cut does not take it away."""
        if len(text) <= INLINE_CHARS:
            return text
        key = uuid.uuid4().hex
        path = self._path(key)
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._files.open(path, "wb") as file:
            file.write(text.encode())
            if isinstance(self._files, LocalFileSystem):
                file.flush()
                os.fsync(file.fileno())
                _sync_folder(Path(path).parent)
        return _MARK + key

    def read(self, kept: str) -> str:
        """The text that keep() was given."""
        if not kept.startswith(_MARK):
            return kept
        text: str = self._files.cat_file(self._path(kept.removeprefix(_MARK))).decode()
        return text

    def drop(self, kept: str) -> None:
        """Forget the text; the row is gone or never came to be. What cannot be deleted stays."""
        if kept.startswith(_MARK):
            try:
                self._files.rm_file(self._path(kept.removeprefix(_MARK)))
            except OSError:
                return

    def _path(self, key: str) -> str:
        # Two levels, since a folder of a million files is slow to list everywhere.
        return f"{self._root}/{key[:2]}/{key}"


def _sync_folder(folder: Path) -> None:
    """A new file's name is in its folder, which is written to the disk apart."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
