"""What goes wrong at the HTTP edge, answered as application/problem+json (RFC 9457).

    Problem                     status, code for programs, detail for people; fields by name where input is at fault
    ├── MalformedBody           400 malformed_body
    ├── KeyRequired             401 key_required
    ├── KeyRefused              401 key_refused
    ├── ScopeMissing            403 scope_missing
    ├── JobNotFound             404 job_not_found
    ├── WorkerNotFound          404 worker_not_found
    ├── WebhookNotFound         404 webhook_not_found, delivery_not_found
    ├── KeyNotFound             404 key_not_found
    ├── HostNotFound            404 host_not_found
    ├── HostRefusal             as the host answered
    ├── JobEnded                409 job_ended
    ├── NotAgain                409 job_not_retryable, input_pruned
    ├── KeyNeeded               409 no_admin_left, key_not_rotated
    ├── WebhookConflict         409 webhook_disabled, too_many_webhooks, delivery_running
    ├── NotJson                 415 not_json
    ├── Invalid                 422 validation_failed
    ├── KeyReused               422 idempotency_key_reused
    ├── TooMany                 429 rate_limited, too_many_queued (app/limits.py), insufficient_quota (app/quotas.py),
    │                               with Retry-After
    ├── Busy                    503, with Retry-After
    ├── HostAway                502 host_unreachable, host_unusable, host_failed; 504 host_timeout
    └── those of app/openai/errors.py

Errors of the rooms below are translated here and nowhere else. The one broad handler logs its frames.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, current_app, g, request
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from app.dispatch import Unavailable
from app.rows import IdempotencyConflict
from engines.failure import frames
from tasks import headers, reading

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
#: A database that is locked or restarting is usually back by then.
DATABASE_RETRY_S = 2


class Problem(Exception):
    """One request that cannot be answered as asked."""

    status = HTTPStatus.BAD_REQUEST
    code = "bad_request"

    def __init__(
        self,
        detail: str,
        *,
        errors: Mapping[str, Sequence[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """errors: messages by dotted field path. extra: further members of the body."""
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})


class MalformedBody(Problem):
    """The body is no JSON object."""

    code = "malformed_body"


class KeyRequired(Problem):
    """A key must be sent."""

    status = HTTPStatus.UNAUTHORIZED
    code = "key_required"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class KeyRefused(KeyRequired):
    """The key is unknown, expired or revoked."""

    code = "key_refused"


class ScopeMissing(Problem):
    """The key is right, but not made for this."""

    status = HTTPStatus.FORBIDDEN
    code = "scope_missing"


class JobNotFound(Problem):
    """No such job, or somebody else's: the same answer, so that ids cannot be probed."""

    status = HTTPStatus.NOT_FOUND
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id[:64]!r} among yours.")


class WorkerNotFound(Problem):
    """No worker of that id or name is there, or was lost within a day."""

    status = HTTPStatus.NOT_FOUND
    code = "worker_not_found"

    def __init__(self, worker: str) -> None:
        super().__init__(f"There is no worker {worker[:64]!r}; GET /api/v1/workers names those there are.")


class WebhookNotFound(Problem):
    """No such webhook or delivery among the caller's own."""

    status = HTTPStatus.NOT_FOUND
    code = "webhook_not_found"

    def __init__(self, webhook_id: str, delivery_id: str | None = None) -> None:
        if delivery_id is None:
            super().__init__(f"There is no webhook {webhook_id[:64]!r} among yours.")
        else:
            super().__init__(f"Webhook {webhook_id[:64]!r} has no delivery {delivery_id[:64]!r}.")
            self.code = "delivery_not_found"


class WebhookConflict(Problem):
    """A webhook, or what it has to deliver, is not in a state for this."""

    status = HTTPStatus.CONFLICT

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class KeyNotFound(Problem):
    """No key has that id."""

    status = HTTPStatus.NOT_FOUND
    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key {key_id[:8]!r}; GET /api/v1/keys names those there are.")


class HostNotFound(Problem):
    """The settings name no such GPU host."""

    status = HTTPStatus.NOT_FOUND
    code = "host_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no host {name[:64]!r}; GET /api/v1/hosts names those there are.")


class HostRefusal(Problem):
    """A GPU host refused what it was asked, and said why."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = status.name.lower()


class HostAway(Problem):
    """A GPU host gave no answer that can be passed on."""

    def __init__(self, status: HTTPStatus, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code


class KeyNeeded(Problem):
    """The key cannot be made, replaced or closed as asked, for the sake of those who need it."""

    status = HTTPStatus.CONFLICT

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class JobEnded(Problem):
    """The job had its outcome already."""

    status = HTTPStatus.CONFLICT
    code = "job_ended"

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"Job {job_id} cannot be cancelled: it is {state}.", extra={"job_status": state})


class NotAgain(Problem):
    """The job cannot be run again."""

    status = HTTPStatus.CONFLICT

    def __init__(self, code: str, detail: str, state: str) -> None:
        super().__init__(detail, extra={"job_status": state})
        self.code = code


class NotJson(Problem):
    """The body's type is none that is read."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "not_json"


class Invalid(Problem):
    """The request is well formed, but breaks a rule."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "validation_failed"

    def __init__(self, errors: Mapping[str, Sequence[str]], *, left_out: int = 0) -> None:
        """left_out: how many further fields are wrong."""
        super().__init__(reading.summary(errors, left_out), errors=errors)


class KeyReused(Problem):
    """The idempotency key belongs to another request."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "idempotency_key_reused"


class TooMany(Problem):
    """The caller asks more than one may; the same request works later."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retry_after_s: int,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s), **(headers or {})}, extra=extra)
        self.code = code


class Busy(Problem):
    """It cannot be done now; the same request may work later."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, code: str, detail: str, *, retry_after_s: int) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})
        self.code = code


def request_id() -> str:
    """This request's id: the client's own X-Request-ID where it is a sane one, else a new one."""
    known: str | None = g.get("request_id")
    if known is None:
        known = g.request_id = headers.request_id(request.headers.get("X-Request-ID", ""))
    return known


#: How a part of the API tells a problem.
Shape = Callable[[Problem], Response]


def register(app: Flask, shapes: Mapping[str, Shape] | None = None) -> None:
    """Make every error of the app a problem. shapes: how it is told below a path that has conventions of its own."""
    app.extensions["error_shapes"] = dict(shapes or {})
    for kind in (OperationalError, InterfaceError, ProgrammingError, PoolTimeout):
        app.register_error_handler(kind, _database_away)
    app.register_error_handler(Problem, answer)
    app.register_error_handler(Unavailable, _unavailable)
    app.register_error_handler(IdempotencyConflict, _key_reused)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def answer(problem: Problem) -> Response:
    """The problem as a response; Problems that are raised are answered by themselves."""
    shapes: Mapping[str, Shape] = current_app.extensions["error_shapes"]
    for prefix, shape in shapes.items():
        if request.path.startswith(prefix):
            return shape(problem)
    status = HTTPStatus(problem.status)
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id(),
        **problem.extra,
    }
    if problem.errors is not None:
        body["errors"] = {field: list(messages) for field, messages in problem.errors.items()}
    # ASCII: a field's name may hold a lone surrogate, which UTF-8 cannot carry.
    return Response(json.dumps(body), status.value, problem.headers, content_type=MEDIA_TYPE)


def _unavailable(error: Unavailable) -> Response:
    return answer(Busy(error.code, error.message, retry_after_s=error.retry_after_s))


def _key_reused(_: IdempotencyConflict) -> Response:
    return answer(KeyReused("This Idempotency-Key was sent with another request before; use a new one."))


def _database_away(error: Exception) -> Response:
    # Not the error itself: its text holds the statement's parameters, prompts among them.
    logger.error(
        "request %s: the database cannot be used: %s", request_id(), getattr(error, "orig", None) or type(error)
    )
    detail = "The database cannot be used right now. Send the request again; a create, with an Idempotency-Key."
    return answer(Busy("database_unavailable", detail, retry_after_s=DATABASE_RETRY_S))


def _http(error: HTTPException) -> Response:
    status = HTTPStatus(error.code or 500)
    if isinstance(error, RequestEntityTooLarge):
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        problem = Problem(f"The body may have at most {limit} bytes.")
        problem.code = "body_too_large"
    elif status is HTTPStatus.NOT_FOUND:
        problem = Problem(f"There is nothing at {request.path[:200]!r}; /docs lists what there is.")
        problem.code = "not_found"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        problem = Problem(f"{request.method} is not allowed here; allowed: {allowed}.", headers={"Allow": allowed})
        problem.code = "method_not_allowed"
    else:
        problem = Problem(error.description or status.phrase)
        problem.code = status.name.lower()
    problem.status = status
    return answer(problem)


def _unexpected(error: Exception) -> Response:
    logger.error("request %s failed: %s", request_id(), frames(error))
    problem = Problem("The server failed; its log has the details under this request_id.")
    problem.status = HTTPStatus.INTERNAL_SERVER_ERROR
    problem.code = "internal_error"
    return answer(problem)
