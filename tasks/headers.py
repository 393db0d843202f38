"""Headers that every answer carries, the API's and a direct worker's."""

import re
import uuid

#: Answers hold text that models wrote: no browser may take it for a page, show it within one, or act on it.
FIXED = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: Unless a view has its own: the documentation and the console are the pages there are.
DEFAULTS = {
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: str) -> str:
    """A request's id: what its client gave as X-Request-ID where that is a sane one, else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
