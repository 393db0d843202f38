"""API keys: made once, shown once, kept as digests.

A key is `gpi_<id>_<secret>`: the id finds the row, the secret's 256 random bits need no slow hash.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Engine, insert, select, update

from app.tables import api_keys, now

_FORMAT = re.compile(r"gpi_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
#: What the digest of an unknown key is compared with, so that it takes as long as that of a known one.
_NO_DIGEST = "0" * 64
#: A key that is made while the API serves without one is asked for after this long.
EXISTENCE_CACHE_S = 1.0


class Scope(StrEnum):
    """What a key may be used for."""

    #: Create jobs, cancel and read one's own.
    INFER = "infer"
    #: Read one's own jobs and the statistics.
    READ = "read"
    #: Everything, on everybody's jobs.
    ADMIN = "admin"
    #: What GPU workers ask the API.
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Key:
    """A key as its row has it; times are unix seconds."""

    id: str
    name: str
    digest: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class RefusedKey(Exception):
    """The presented key opens nothing; the message says why."""


class Keys:
    """The api_keys table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._exist = False
        self._asked_at = float("-inf")

    def exist(self) -> bool:
        """Whether a key was ever made, revoked ones too: to revoke the last one opens nothing."""
        if not self._exist and time.monotonic() - self._asked_at > EXISTENCE_CACHE_S:
            with self._engine.connect() as connection:
                self._exist = connection.execute(select(api_keys.c.id).limit(1)).first() is not None
            self._asked_at = time.monotonic()
        return self._exist

    def check(self, presented: str) -> Key:
        """The key that was presented. Raises RefusedKey."""
        found = None
        if match := _FORMAT.fullmatch(presented):
            query = select(*api_keys.c, now().label("now")).where(api_keys.c.id == match[1])
            with self._engine.connect() as connection:
                found = connection.execute(query).first()
        if not hmac.compare_digest(_digest(presented), found.digest if found else _NO_DIGEST) or found is None:
            raise RefusedKey("This key is not known.")
        if found.revoked_at is not None:
            raise RefusedKey("This key was revoked.")
        if found.expires_at is not None and found.expires_at <= found.now:
            raise RefusedKey("This key has expired.")
        return _key(found)

    def create(self, name: str, scopes: Iterable[Scope], *, expires_days: float | None = None) -> str:
        """A new key's text, which nothing can show again."""
        key_id = secrets.token_hex(4)
        text = f"gpi_{key_id}_{secrets.token_urlsafe(32)}"
        statement = insert(api_keys).values(
            id=key_id,
            name=name,
            digest=_digest(text),
            scopes=",".join(sorted(set(scopes))),
            created_at=now(),
            expires_at=None if expires_days is None else now() + expires_days * 86_400,
        )
        with self._engine.connect() as connection:
            connection.execute(statement)
        return text

    def all(self) -> Sequence[Key]:
        """Every key, oldest first."""
        with self._engine.connect() as connection:
            return [_key(found) for found in connection.execute(select(api_keys).order_by(api_keys.c.created_at))]

    def revoke(self, key_id: str) -> bool:
        """Close a key for good, at once; False if there is no open key with that id."""
        statement = update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self._engine.connect() as connection:
            return connection.execute(statement.values(revoked_at=now())).rowcount == 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(found: object) -> Key:
    values = dict(found._mapping)  # type: ignore[attr-defined]
    values.pop("now", None)
    return Key(**{**values, "scopes": frozenset(map(Scope, values["scopes"].split(",")))})
