"""Who asks, and whether they may: every view states what it needs, and one that states nothing is closed."""

import ipaddress
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flask import current_app, g, request

from gpu_admin.audit import Caller
from gpu_admin.contract import HostError, Refused, Unavailable
from gpu_admin.keys import Keys, KeysUnreadable, Scope

logger = logging.getLogger(__name__)

#: Who is not let in, in the audit log.
NOBODY = "nobody"
#: Programs on this host while no key exists, and then anybody else where the settings let them read.
LOCAL = "local"
ANONYMOUS = "anonymous"
#: Headers that a proxy adds: whoever connects from here then speaks for somebody else.
PROXY_HEADERS = ("X-Forwarded-For", "X-Real-IP", "Forwarded")

View = TypeVar("View", bound=Callable[..., Any])


class KeyRequired(HostError):
    """A key must be sent, or another one."""

    status = HTTPStatus.UNAUTHORIZED


def needs(scope: Scope | None) -> Callable[[View], View]:
    """Open a view to callers with that scope, and to admins; None opens it to everybody."""

    def open_view(view: View) -> View:
        view.needs = scope  # type: ignore[attr-defined]
        return view

    return open_view


#: Opens a view to everybody.
public = needs(None)


def caller() -> Caller:
    """Whoever sent this request; NOBODY if they were not let in."""
    return Caller(g.get("key_name", NOBODY), request.remote_addr or "")


class Guard:
    """Looks at every request before its view does."""

    def __init__(self, keys: Keys, *, allow_anonymous: bool) -> None:
        self._keys = keys
        self._allow_anonymous = allow_anonymous

    def admit(self) -> None:
        """Note who asks. Raises KeyRequired, Refused, or Unavailable while the keys cannot be read."""
        if request.endpoint is None:
            return
        view = current_app.view_functions[request.endpoint]
        if not hasattr(view, "needs"):
            logger.error("view %s states no scope, so nobody may call it", request.endpoint)
            raise Refused("Nobody may call this.")
        if view.needs is None:
            return
        try:
            g.key_name, scope = self._identify()
        except KeysUnreadable as error:
            logger.error("nobody is let in: %s", error)
            raise Unavailable("The file of API keys cannot be read; the server's log says why.") from error
        if scope not in (view.needs, Scope.ADMIN):
            raise Refused(f"This needs a key with scope {view.needs}; yours has {scope}.")

    def _identify(self) -> tuple[str, Scope]:
        """The name and the scope of the caller's key."""
        if not self._keys.exist():
            return self._without_keys()
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        presented = request.headers.get("X-API-Key") or (token.strip() if scheme.lower() == "bearer" else "")
        if not presented:
            raise KeyRequired("Send an API key, as X-API-Key: <key> or Authorization: Bearer <key>.")
        key = self._keys.find(presented)
        if key is None:
            raise KeyRequired("This key is not known, or was revoked.")
        return key.name, key.scope

    def _without_keys(self) -> tuple[str, Scope]:
        if _is_local():
            return LOCAL, Scope.ADMIN
        if self._allow_anonymous:
            return ANONYMOUS, Scope.READ
        raise KeyRequired(
            "No API key exists yet, so only programs on the host itself are served. "
            "Make one there: python -m gpu_admin.keys create NAME --scope admin"
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
    """Whether a host name or address means this host alone."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
