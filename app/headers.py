"""Headers that every answer carries."""

from flask import Flask, Response

from app.errors import request_id


def register(app: Flask) -> None:
    """Add them to every answer of the app."""
    app.after_request(_complete)


def _complete(response: Response) -> Response:
    headers = response.headers
    headers["X-Request-ID"] = request_id()
    # Answers hold text that models wrote: no browser may take it for a page.
    headers["X-Content-Type-Options"] = "nosniff"
    headers.setdefault("Cache-Control", "no-store")
    return response
