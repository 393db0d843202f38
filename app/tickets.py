"""Tickets: what an outcome must carry to be believed, one for each job, attempt and region.

The API signs it, the job's record takes it to whoever begins the attempt, and the envelope brings it back. The key lies
in SQL, which no worker reaches, so every API and control process has the same one and there is nothing to set.

It keeps out whoever may write to a store or broker, or speak for another region, without having begun the job. It does
not keep out who can read the record of that very job: its ticket lies there until the job has ended.
"""

import base64
import hmac
import secrets

from sqlalchemy import Engine, select
from sqlalchemy import insert as sql_insert
from sqlalchemy.exc import IntegrityError

from app.tables import signing_key

#: Of SHA-256's 32: half of them is still more than anybody can try.
TICKET_BYTES = 16


class Tickets:
    """Signs and checks; threads may share it. Raises SQLAlchemyError while the key was never read and cannot be."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._key: bytes | None = None

    def sign(self, job_id: str, attempt: int, region: str) -> str:
        """The ticket of an attempt in a region, 22 characters."""
        self._key = self._key or self._read()
        return _ticket(self._key, job_id, attempt, region)

    def good(self, ticket: str, job_id: str, attempt: int, region: str) -> bool:
        """Whether it is the one that was signed for that attempt there."""
        if self._matches(ticket, job_id, attempt, region):
            return True
        # Somebody may have replaced the key since it was read; outcomes that are refused are rare.
        self._key = None
        return self._matches(ticket, job_id, attempt, region)

    def _matches(self, ticket: str, job_id: str, attempt: int, region: str) -> bool:
        return hmac.compare_digest(self.sign(job_id, attempt, region).encode(), str(ticket).encode(errors="replace"))

    def _read(self) -> bytes:
        """The key; made now if there is none."""
        query = select(signing_key.c.secret)
        with self._engine.connect() as connection:
            found = connection.execute(query).scalar()
        if found is None:
            try:
                with self._engine.connect() as connection:
                    connection.execute(sql_insert(signing_key).values(id=1, secret=secrets.token_hex(32)))
            except IntegrityError:
                # Another process was faster; its key is everybody's.
                pass
            with self._engine.connect() as connection:
                found = connection.execute(query).scalar_one()
        return bytes.fromhex(found)


def _ticket(key: bytes, job_id: str, attempt: int, region: str) -> str:
    digest = hmac.digest(key, f"{job_id}\n{attempt}\n{region}".encode(errors="replace"), "sha256")
    return base64.urlsafe_b64encode(digest[:TICKET_BYTES]).rstrip(b"=").decode()
