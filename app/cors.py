"""Pages of other sites in a browser: none may read an answer, but those of the origins that the settings list."""

from collections.abc import Sequence
from http import HTTPStatus

from flask import Flask, Response, request

METHODS = "GET, POST, DELETE"
#: What a page may send, and what of an answer it may read, beyond what browsers allow by themselves.
SENT = "Authorization, Content-Type, Idempotency-Key, X-API-Key, X-Request-ID"
READ = "Idempotent-Replayed, Location, Retry-After, X-Job-Id, X-RateLimit-Limit, X-RateLimit-Remaining, X-Request-ID"
#: How long a browser may remember the answer to its question whether it may ask.
MAX_AGE_S = 600


def register(app: Flask, origins: Sequence[str]) -> None:
    """Let pages of these origins call the app, with a key that they hold: browsers send no cookie or certificate along.

    To be registered before the Guard, which a browser's question whether it may ask has no key for.
    """
    if not origins:
        return
    listed = frozenset(origins)

    def answer_preflight() -> Response | None:
        asked = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if not asked or request.headers.get("Origin") not in listed:
            return None
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": SENT,
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        return Response(status=HTTPStatus.NO_CONTENT, headers=headers)

    def allow(response: Response) -> Response:
        response.headers.add("Vary", "Origin")
        origin = request.headers.get("Origin")
        if origin in listed:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = READ
        return response

    app.before_request(answer_preflight)
    app.after_request(allow)
