"""Who asks, and whether they may: every view states its scopes, and one that states none is closed."""

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import current_app, g, request

from app.errors import KeyRefused, KeyRequired, ScopeMissing
from app.keys import NO_QUOTAS, Keys, Quotas, RefusedKey, Scope

logger = logging.getLogger(__name__)

#: Owner of the jobs that are made while no key exists, and what programs on this host then have in place of a key.
LOCAL = "local"
#: What anybody else has then, where the settings let them in.
ANONYMOUS = "anonymous"
#: Headers that a proxy adds: whoever connects from here then speaks for somebody else.
PROXY_HEADERS = ("X-Forwarded-For", "X-Real-IP", "Forwarded")

View = TypeVar("View", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent the request."""

    #: Key id, LOCAL or ANONYMOUS.
    key: str
    #: Whom the jobs that it makes belong to; keys that replace one another have the same.
    owner: str
    scopes: frozenset[Scope]
    quotas: Quotas = NO_QUOTAS

    @property
    def sees(self) -> str | None:
        """The owner whose jobs it may see; None is everybody's."""
        return None if Scope.ADMIN in self.scopes else self.owner


def requires(*scopes: Scope) -> Callable[[View], View]:
    """Open a view to callers with any of the scopes, and to admins."""

    def open_view(view: View) -> View:
        view.scopes = frozenset(scopes)  # type: ignore[attr-defined]
        return view

    return open_view


#: Opens a view to everybody.
public = requires()


def scopes_of(endpoint: str) -> frozenset[Scope] | None:
    """What a view asks for: nothing if it is public, None if it does not say."""
    scopes: frozenset[Scope] | None = getattr(current_app.view_functions[endpoint], "scopes", None)
    return scopes


def caller() -> Caller:
    """Whoever sent this request."""
    known: Caller = g.caller
    return known


class Guard:
    """Looks at every request before its view does."""

    def __init__(self, keys: Keys, *, allow_anonymous: bool) -> None:
        self._keys = keys
        self._allow_anonymous = allow_anonymous

    def admit(self) -> None:
        """Set the caller. Raises KeyRequired, KeyRefused or ScopeMissing."""
        if request.endpoint is None:
            return
        needed = scopes_of(request.endpoint)
        if needed is None:
            logger.error("view %s states no scope, so nobody may call it", request.endpoint)
            raise ScopeMissing("Nobody may call this.")
        if not needed:
            return
        g.caller = self._identify()
        if not g.caller.scopes & {*needed, Scope.ADMIN}:
            names = " or ".join(sorted(needed))
            raise ScopeMissing(f"This needs a key with scope {names}; yours has {', '.join(sorted(g.caller.scopes))}.")

    def _identify(self) -> Caller:
        if not self._keys.exist():
            return self._anonymous()
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        presented = request.headers.get("X-API-Key") or (token.strip() if scheme.lower() == "bearer" else "")
        if not presented:
            raise KeyRequired("Send an API key, as X-API-Key: <key> or Authorization: Bearer <key>.")
        try:
            key = self._keys.check(presented)
        except RefusedKey as error:
            # For the audit log.
            g.refused_key = error.key_id
            raise KeyRefused(str(error)) from error
        return Caller(key.id, key.owner, key.scopes, key.quotas)

    def _anonymous(self) -> Caller:
        if _is_local():
            return Caller(LOCAL, LOCAL, frozenset(Scope))
        if self._allow_anonymous:
            return Caller(ANONYMOUS, LOCAL, frozenset({Scope.INFER, Scope.READ}))
        raise KeyRequired(
            "No API key exists yet, so only programs on the server itself are served. "
            "Make one there: flask --app wsgi keys create NAME --scope infer"
        )


def _is_local() -> bool:
    """Whether a program on this host speaks for itself: no proxy, and no page of another site in a browser here."""
    if not is_loopback(request.remote_addr or "") or any(name in request.headers for name in PROXY_HEADERS):
        return False
    # A page elsewhere can send requests here, and with a name of its own that resolves to 127.0.0.1 read the answers.
    host = urlsplit(f"//{request.host}")
    origin = request.headers.get("Origin")
    return is_loopback(host.hostname or "") and (origin is None or urlsplit(origin).netloc == request.host)


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
