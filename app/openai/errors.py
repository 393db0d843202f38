"""Problems in OpenAI's shape, and those that only these routes raise.

Problem
├── ModelNotFound           404 model_not_found
├── ModelLoading            503 model_loading, with Retry-After and how far it is
└── NoResult                what became of a job that was waited for in vain; with X-Job-Id, and not to be retried
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from flask import Response
from marshmallow import Schema, fields

from app.errors import Problem

#: Our codes by OpenAI's.
CODES = {
    "key_required": "invalid_api_key",
    "key_refused": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "too_many_queued": "rate_limit_exceeded",
}
#: What a status means to OpenAI's clients; others are invalid_request_error or server_error.
TYPES = {
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class ModelNotFound(Problem):
    """No model of that name."""

    status = HTTPStatus.NOT_FOUND
    code = "model_not_found"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, errors={"model": [detail]})


class ModelLoading(Problem):
    """A worker loads the model just now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "model_loading"

    def __init__(self, model: str, *, node: str, retry_after_s: int) -> None:
        """node: the worker's name."""
        super().__init__(
            f"{model} is being loaded by {node}; send the request again in {retry_after_s} s.",
            headers={"Retry-After": str(retry_after_s)},
            extra={"loading": {"model": model, "state": "loading", "node": node}},
        )


class NoResult(Problem):
    """The job ended without a result, or goes on without its caller."""

    def __init__(self, status: int, code: str, detail: str, job_id: str) -> None:
        # OpenAI's clients would send a job that failed or takes long twice more.
        super().__init__(detail, headers={"X-Job-Id": job_id, "x-should-retry": "false"})
        self.status = HTTPStatus(status)
        self.code = code


class OpenAiErrorMembers(Schema):
    """What went wrong."""

    message = fields.String(required=True)
    type = fields.String(required=True, metadata={"example": "invalid_request_error"})
    param = fields.String(
        required=True, allow_none=True, metadata={"description": "The field at fault, by its dotted path."}
    )
    code = fields.String(required=True, allow_none=True, metadata={"description": "For programs; never changes."})


class OpenAiError(Schema):
    """Why a request was not answered as asked, in OpenAI's shape."""

    error = fields.Nested(OpenAiErrorMembers, required=True)


def shape(problem: Problem) -> Response:
    """The problem as OpenAI's clients expect it."""
    # ASCII: a field's name may hold a lone surrogate, which UTF-8 cannot carry.
    text = json.dumps(body(problem))
    return Response(text, _status(problem).value, problem.headers, content_type="application/json")


def body(problem: Problem) -> dict[str, Any]:
    """The problem as a JSON object."""
    status = _status(problem)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = CODES.get(problem.code, problem.code)
    if code in ("insufficient_quota", "model_loading"):
        kind = code
    error = {"message": problem.detail, "type": kind, "param": _first(problem.errors), "code": code}
    return {"error": error, **problem.extra}


def _status(problem: Problem) -> HTTPStatus:
    # OpenAI answers every request that breaks a rule with 400.
    status = HTTPStatus(problem.status)
    return HTTPStatus.BAD_REQUEST if status is HTTPStatus.UNPROCESSABLE_ENTITY else status


def _first(errors: Mapping[str, Any] | None) -> str | None:
    return next(iter(errors)) if errors else None
