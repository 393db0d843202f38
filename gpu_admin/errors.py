"""What goes wrong at the HTTP edge, answered as {"detail": ...}. The one broad handler logs its frames."""

import logging
import traceback
from http import HTTPStatus

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from gpu_admin.contract import HostError

logger = logging.getLogger(__name__)


def register(app: Flask) -> None:
    """Make every error of the app a {"detail": ...}."""
    app.register_error_handler(HostError, _host_error)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def _host_error(error: HostError) -> Response:
    answer = _answer(error.detail, error.status)
    if error.status is HTTPStatus.UNAUTHORIZED:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def _http(error: HTTPException) -> Response:
    status = HTTPStatus(error.code or 500)
    if status is HTTPStatus.NOT_FOUND:
        return _answer(f"There is nothing at {request.path[:200]!r}; /docs lists what there is.", status)
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        answer = _answer(f"{request.method} is not allowed here; allowed: {allowed}.", status)
        answer.headers["Allow"] = allowed
        return answer
    return _answer(error.description or status.phrase, status)


def _unexpected(error: Exception) -> Response:
    # Not in its own words: they may quote the request, whose settings of an instance can hold passwords.
    where = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("%s %r failed: %s\n%s", request.method, request.path[:200], type(error).__name__, where)
    return _answer("The server failed; its log has the details.", HTTPStatus.INTERNAL_SERVER_ERROR)


def _answer(detail: str, status: HTTPStatus) -> Response:
    answer = jsonify(detail=detail)
    answer.status_code = status
    return answer
