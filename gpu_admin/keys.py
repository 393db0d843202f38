"""API keys of one host, and the command that makes them: `python -m gpu_admin.keys create NAME --scope admin`.

Made once, shown once, kept as digests in <data_dir>/keys.json, which every process reads again when it changes. A key
is `gpa_` and 256 random bits, which need no slow hash.
"""

import hashlib
import hmac
import json
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from gpu_admin import locks, whole_file
from gpu_admin.environment import read_settings
from gpu_admin.settings import SettingsError

NAME = "keys.json"
PREFIX = "gpa_"


class Scope(StrEnum):
    """What a key may be used for."""

    #: Look at GPUs and models.
    READ = "read"
    #: Also start, stop and kill, and read the servers' logs.
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret; times are unix seconds."""

    name: str
    sha256: str
    scope: Scope
    created_at: float
    revoked_at: float | None = None


class KeysUnreadable(Exception):
    """The file is there and cannot be read or understood; the message says why. Nobody is let in meanwhile."""


class NameTaken(Exception):
    """A key of that name exists, or did: names tell who did what in the audit log."""


class Keys:
    """The keys file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._turn = threading.Lock()
        self._read: tuple[object, Sequence[Key]] = (None, ())

    def exist(self) -> bool:
        """Whether a key was ever made; to revoke the last one opens nothing. Raises KeysUnreadable."""
        return bool(self.all())

    def find(self, presented: str) -> Key | None:
        """The open key that was presented, if it is one. Raises KeysUnreadable."""
        digest = _digest(presented)
        found = None
        # Every one is compared, in the same time: how long it took tells nothing of which one is near.
        for key in self.all():
            if hmac.compare_digest(digest, key.sha256) and key.revoked_at is None:
                found = key
        return found

    def all(self) -> Sequence[Key]:
        """Every key, oldest first. Raises KeysUnreadable."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeysUnreadable(f"{self._path} cannot be read: {error.strerror}.") from error
        mark = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        with self._turn:
            if self._read[0] != mark:
                self._read = (mark, self._load())
            return self._read[1]

    def create(self, name: str, scope: Scope) -> str:
        """A new key's text, which nothing can show again. Raises NameTaken, KeysUnreadable and OSError."""
        text = PREFIX + secrets.token_urlsafe(32)
        with locks.held(self._path.with_suffix(".lock")):
            keys = self._load()
            if any(key.name == name for key in keys):
                raise NameTaken(f"There is, or was, a key {name}; its name stays with it.")
            self._save([*keys, Key(name, _digest(text), scope, time.time())])
        return text

    def revoke(self, name: str) -> bool:
        """Close a key for good, at once; False if there is no open one of that name. Raises KeysUnreadable, OSError."""
        with locks.held(self._path.with_suffix(".lock")):
            keys = self._load()
            if not any(key.name == name and key.revoked_at is None for key in keys):
                return False
            self._save([replace(key, revoked_at=time.time()) if key.name == name else key for key in keys])
        return True

    def _load(self) -> list[Key]:
        try:
            entries: list[dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))
            return [Key(**{**entry, "scope": Scope(entry["scope"])}) for entry in entries]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KeysUnreadable(f"{self._path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise KeysUnreadable(f"{self._path} is no list of keys: {error}") from error

    def _save(self, keys: Sequence[Key]) -> None:
        whole_file.write(self._path, json.dumps([asdict(key) for key in keys], indent=1), mode=0o600)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@click.group()
def main() -> None:
    """API keys of this host. Run it as the user of the service, which has to read the file."""


@main.command()
@click.argument("name")
@click.option("--scope", type=click.Choice([str(scope) for scope in Scope]), required=True)
def create(name: str, scope: str) -> None:
    """Make a key and print it, this once."""
    if not 1 <= len(name) <= 128:
        raise click.BadParameter("A name has 1 to 128 characters.")
    click.echo(_keys().create(name, Scope(scope)))
    click.echo("Keep it: it cannot be shown again. From now on every request needs a key.", err=True)


@main.command("list")
def show() -> None:
    """Show every key without its secret."""
    for key in _keys().all():
        state = "open" if key.revoked_at is None else f"revoked {_day(key.revoked_at)}"
        click.echo(f"{key.scope:5}  {state:18}  {_day(key.created_at)}  {key.name}")


@main.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Close a key for good."""
    if not _keys().revoke(name):
        raise click.ClickException(f"There is no open key {name}.")
    click.echo(f"{name} is revoked.")


def _keys() -> Keys:
    return Keys(read_settings().data_dir)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, KeysUnreadable, NameTaken, OSError) as error:
        sys.exit(str(error))
