"""Puts the headers on every answer of the API."""

from flask import Flask, Response

from app.errors import request_id
from tasks.headers import DEFAULTS, FIXED


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
