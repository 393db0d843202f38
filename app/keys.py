"""API keys: made once, shown once, kept as digests.

A key is `gpi_<id>_<secret>`: the id finds the row, the secret's 256 random bits need no slow hash.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from sqlalchemy import Engine, insert, select, update

from app.tables import api_keys, now

_FORMAT = re.compile(r"gpi_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_OPEN = api_keys.c.revoked_at.is_(None) & (api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > now()))
#: What the digest of an unknown key is compared with, so that it takes as long as that of a known one.
_NO_DIGEST = "0" * 64
#: The most turns that a key may have for each turn of a key of weight 1.
MOST_WEIGHT = 1000
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
class Quotas:
    """The most that a key may use in a day and in a month of UTC; None is no limit."""

    jobs_per_day: int | None = None
    jobs_per_month: int | None = None
    #: Prompt and completion together.
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    gpu_seconds_per_day: int | None = None
    gpu_seconds_per_month: int | None = None

    def encode(self) -> str:
        """As JSON text, without what has no limit."""
        return json.dumps({name: most for name, most in asdict(self).items() if most is not None})


#: A key without limits.
NO_QUOTAS = Quotas()


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
    #: Whom the jobs belong to that it makes: the id of the first key that it replaces, or its own.
    owner: str
    #: How many turns it has for each turn of a key of weight 1 (app/turns.py).
    weight: int
    quotas: Quotas

    def is_open(self, at: float) -> bool:
        """Whether it opens anything at that time, in unix seconds."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > at)


class RefusedKey(Exception):
    """The presented key opens nothing; the message says why."""

    def __init__(self, message: str, key_id: str | None = None) -> None:
        """key_id: of a key that was right once."""
        super().__init__(message)
        self.key_id = key_id


class NotRotated(Exception):
    """The key cannot be replaced now; the message says why, and what to do."""


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
            raise RefusedKey("This key was revoked.", found.id)
        if found.expires_at is not None and found.expires_at <= found.now:
            raise RefusedKey("This key has expired.", found.id)
        return _key(found)

    def create(
        self,
        name: str,
        scopes: Iterable[Scope],
        *,
        expires_days: float | None = None,
        weight: int = 1,
        quotas: Quotas = NO_QUOTAS,
    ) -> str:
        """A new key's text, which nothing can show again."""
        return self._insert(name, scopes, None if expires_days is None else expires_days * 86_400, weight, quotas)

    def rotate(self, key_id: str, *, overlap_s: float, expires_days: float | None = None) -> str:
        """The text of a second key that is like the first one, which expires after overlap_s.

        Without expires_days the new key lives for as long as the old one was meant to. Raises NotRotated.
        """
        owner = select(api_keys.c.owner).where(api_keys.c.id == key_id).scalar_subquery()
        with self._engine.connect() as connection:
            found = connection.execute(select(*api_keys.c).where(api_keys.c.owner == owner, _OPEN)).all()
        known = {row.id: _key(row) for row in found}
        old = known.pop(key_id, None)
        if old is None:
            raise NotRotated(f"There is no open key {key_id}.")
        if known:
            raise NotRotated(f"Key {next(iter(known))} of the same owner is open too; revoke it first.")
        lifetime_s = None if old.expires_at is None else old.expires_at - old.created_at
        if expires_days is not None:
            lifetime_s = expires_days * 86_400
        # First: if the second step fails, both are open, and nobody is locked out.
        text = self._insert(old.name, old.scopes, lifetime_s, old.weight, old.quotas, owner=old.owner)
        end = now() + overlap_s
        sooner = api_keys.c.expires_at.is_(None) | (api_keys.c.expires_at > end)
        with self._engine.connect() as connection:
            connection.execute(update(api_keys).where(api_keys.c.id == key_id, sooner).values(expires_at=end))
        return text

    def change(
        self,
        key_id: str,
        *,
        name: str | None = None,
        weight: int | None = None,
        quotas: Mapping[str, int | None] | None = None,
    ) -> Key | None:
        """The key with another name, weight or quotas; None if there is no such key.

        quotas: those of Quotas that change. Weight and quotas are the owner's: all keys of the same one have them.
        """
        while (key := self.find(key_id)) is not None:
            values: dict[str, str | int] = {} if weight is None else {"weight": weight}
            if quotas:
                values["quotas"] = replace(key.quotas, **quotas).encode()
            same = (api_keys.c.owner == key.owner, api_keys.c.quotas == key.quotas.encode())
            with self._engine.connect() as connection:
                if values and not connection.execute(update(api_keys).where(*same).values(**values)).rowcount:
                    # Somebody else changed the quotas just now.
                    continue
                if name is not None:
                    connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(name=name))
            return self.find(key_id)
        return None

    def find(self, key_id: str) -> Key | None:
        """The key of that id, open or not."""
        with self._engine.connect() as connection:
            found = connection.execute(select(*api_keys.c).where(api_keys.c.id == key_id)).first()
        return _key(found) if found else None

    def open_admins(self) -> list[str]:
        """Ids of the open keys with scope admin."""
        with self._engine.connect() as connection:
            found = connection.execute(select(api_keys.c.id, api_keys.c.scopes).where(_OPEN))
            return [key_id for key_id, scopes in found if Scope.ADMIN in scopes.split(",")]

    def weights(self) -> dict[str, int]:
        """Of every owner that has a key."""
        with self._engine.connect() as connection:
            found = connection.execute(select(api_keys.c.owner, api_keys.c.weight))
            return {row.owner: row.weight for row in found}

    def _insert(
        self,
        name: str,
        scopes: Iterable[Scope],
        lifetime_s: float | None,
        weight: int,
        quotas: Quotas,
        *,
        owner: str | None = None,
    ) -> str:
        """A new row, and the text of its key."""
        key_id = secrets.token_hex(4)
        text = f"gpi_{key_id}_{secrets.token_urlsafe(32)}"
        statement = insert(api_keys).values(
            id=key_id,
            name=name,
            digest=_digest(text),
            scopes=",".join(sorted(set(scopes))),
            created_at=now(),
            expires_at=None if lifetime_s is None else now() + lifetime_s,
            owner=owner or key_id,
            weight=weight,
            quotas=quotas.encode(),
        )
        with self._engine.connect() as connection:
            connection.execute(statement)
        self._exist = True
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
    values["scopes"] = frozenset(map(Scope, values["scopes"].split(",")))
    values["quotas"] = Quotas(**json.loads(values["quotas"]))
    return Key(**values)


def id_of(text: str) -> str:
    """The id of a key; the whole key is what people have at hand."""
    return text.removeprefix("gpi_")[:8]
