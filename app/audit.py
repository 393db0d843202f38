"""Who did what that only operators may, in an SQL table to which rows are only added, until they are too old.

A row for each call of a view that is not for clients (admin, worker), let in or refused; for each look at, or cancel
of, somebody else's job; and for each command that changes keys. `flask --app wsgi audit` shows it.
"""

import getpass
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote

from flask import Flask, Response, g, request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError

from app.auth import scopes_of
from app.keys import Scope
from app.origin import address_here
from app.tables import audit, now

logger = logging.getLogger(__name__)

#: A read that is repeated within this is written down once, for each process: a page that looks every second would
#: fill the table.
READS = RateLimitItemPerMinute(1, 10)
#: Refusals that are written down, of one address and of all, for each process: they need no key, so anybody could
#: fill the table.
REFUSALS = RateLimitItemPerMinute(20)
ALL_REFUSALS = RateLimitItemPerMinute(200)

_CLIENTS = frozenset({Scope.INFER, Scope.READ})
_LONGEST_TARGET = 512


@dataclass(frozen=True, slots=True)
class Event:
    """A row; at is unix seconds by the database's clock."""

    id: int
    at: float
    #: A key's id, "local" for a program on the server while no key exists, "cli:<user>" for a command; None for
    #: whoever sent no key that is known.
    actor: str | None
    #: Of the client, behind trusted proxies too; None for a command.
    address: str | None
    #: The view's name, as "workers.drain", or the command's, as "keys.create".
    action: str
    #: The path that was called, or the key's id.
    target: str
    #: The HTTP status, and the problem's code where there is one; "ok" for a command.
    result: str


class Audit:
    """The audit table. Threads may share it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen = FixedWindowRateLimiter(MemoryStorage())

    def record(self, action: str, target: str, result: str, *, actor: str | None, address: str | None) -> None:
        """Add a row. Raises nothing: one that the database does not take is logged as an ERROR."""
        values = {
            "actor": actor,
            "address": address,
            "action": action,
            "target": target[:_LONGEST_TARGET],
            "result": result,
        }
        try:
            with self._engine.connect() as connection:
                connection.execute(insert(audit).values(at=now(), **values))
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or type(error)
            logger.error("the audit log cannot be written (%s); this is not in it: %s", cause, values)

    def command(self, action: str, target: str) -> None:
        """Add a row for what the operator typed."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            # A container's user needs no name.
            user = str(os.getuid())
        self.record(action, target, "ok", actor=f"cli:{user}"[:64], address=None)

    def request(self, response: Response) -> Response:
        """Add a row for the request at hand, if its view is not for clients or the job was somebody else's."""
        endpoint = request.endpoint
        foreign: str | None = g.get("foreign_owner")
        if endpoint is None or not (foreign or _is_for_operators(endpoint)):
            return response
        caller = g.get("caller")
        actor: str | None = caller.key if caller else g.get("refused_key")
        address = str(address_here() or request.remote_addr or "")[:64]
        refused = response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        # Quoted: one line, whatever it is made of.
        target = quote(request.path, safe="/:@") + (f" of {foreign}" if foreign else "") + g.get("audit_target", "")
        if refused and not self._is_among_the_first(address):
            return response
        is_read = request.method in ("GET", "HEAD") and not refused
        if is_read and not self._seen.hit(READS, actor or "", address, endpoint, target):
            return response
        self.record(endpoint, target, _result(response), actor=actor, address=address)
        return response

    def newest(
        self, *, actor: str | None = None, action: str | None = None, hours: float | None = None, limit: int = 100
    ) -> Sequence[Event]:
        """The newest rows, oldest of them first. action: the beginning of its name."""
        query = select(*audit.c).order_by(audit.c.id.desc()).limit(limit)
        if actor is not None:
            query = query.where(audit.c.actor == actor)
        if action is not None:
            query = query.where(audit.c.action.startswith(action, autoescape=True))
        if hours is not None:
            query = query.where(audit.c.at > now() - hours * 3600)
        with self._engine.connect() as connection:
            return [Event(**row._mapping) for row in reversed(connection.execute(query).all())]

    def prune(self, days: float, limit: int | None = None) -> int:
        """Remove rows that are older, at most so many; how many there were. Raises SQLAlchemyError."""
        old = select(audit.c.id).where(audit.c.at < now() - days * 86_400)
        if limit is not None:
            old = old.order_by(audit.c.at).limit(limit)
        with self._engine.connect() as connection:
            return connection.execute(delete(audit).where(audit.c.id.in_(old.scalar_subquery()))).rowcount

    def _is_among_the_first(self, address: str) -> bool:
        if self._seen.hit(REFUSALS, address) and self._seen.hit(ALL_REFUSALS, "all"):
            return True
        if self._seen.hit(RateLimitItemPerMinute(1), "told"):
            logger.warning("refused calls are left out of the audit log, of %s and maybe others: too many", address)
        return False


def register(app: Flask, engine: Engine) -> Audit:
    """The app's audit log, which sees every answer."""
    log = Audit(engine)
    app.after_request(log.request)
    return log


def note_target(words: str) -> None:
    """Say what the request at hand made or changed, where its path does not."""
    g.audit_target = words


def note_foreign(owner: str) -> None:
    """Say that the request at hand sees or changes a job of this owner, who is not its caller."""
    g.foreign_owner = owner


def _is_for_operators(endpoint: str) -> bool:
    scopes = scopes_of(endpoint)
    return scopes is not None and bool(scopes) and not scopes & _CLIENTS


def _result(response: Response) -> str:
    body = response.get_json(silent=True) if response.status_code >= HTTPStatus.BAD_REQUEST else None
    code = body.get("code") if isinstance(body, dict) else None
    return f"{response.status_code} {code}"[:64] if code else str(response.status_code)
