"""Headers that every answer carries."""

from flask import Flask, Response

from app.errors import request_id

#: Answers hold text that models wrote: no browser may take it for a page, show it within one, or act on it.
FIXED = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: Unless a view has its own: the documentation is the one page there is.
DEFAULTS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def register(app: Flask, *, hsts_s: int = 0) -> None:
    """Add them to every answer of the app. hsts_s: for how long browsers are to come by TLS alone; 0 says nothing."""

    def complete(response: Response) -> Response:
        headers = response.headers
        headers["X-Request-ID"] = request_id()
        headers.update(FIXED)
        for name, value in DEFAULTS.items():
            headers.setdefault(name, value)
        if hsts_s:
            headers["Strict-Transport-Security"] = f"max-age={hsts_s}"
        return response

    app.after_request(complete)
