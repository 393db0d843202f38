"""Reading requests: strict JSON, and refusals (400) that name the field, the rule and the near names."""

import json
from collections import Counter
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

import flask_smorest
from flask import Request
from marshmallow import RAISE, Schema, ValidationError
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge

from gpu_admin.contract import BadRequest, HostError
from gpu_admin.settings import near

#: A request names a model, a GPU and a few options.
MOST_BODY_BYTES = 64 * 1024
#: A refusal cuts longer names: a body of junk is not echoed.
LONGEST_NAME = 100


class TooLarge(HostError):
    """The body has more bytes than any request needs."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class NotJson(HostError):
    """The body's type is none that is read."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class Parser(FlaskParser):  # type: ignore[misc]
    """webargs with our JSON and our refusals."""

    DEFAULT_UNKNOWN_BY_LOCATION = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}
    DEFAULT_VALIDATION_STATUS = int(HTTPStatus.BAD_REQUEST)

    def load_json(self, req: Request, schema: Schema) -> dict[str, Any]:
        """The body's JSON object. Raises TooLarge, NotJson or BadRequest."""
        # A page of another site can send text and forms here without asking; JSON it cannot. A body without a type is
        # let through, for the sake of bare HTTP clients: the Guard has seen its origin.
        if req.mimetype and not req.is_json:
            raise NotJson(f"The body must be JSON: send Content-Type: application/json, not {req.mimetype[:64]!r}.")
        req.max_content_length = MOST_BODY_BYTES
        try:
            return _parse_object(req.get_data(cache=False))
        except RequestEntityTooLarge as error:
            raise TooLarge(f"The body may have at most {MOST_BODY_BYTES} bytes.") from error

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **_: Any) -> NoReturn:
        """Raises BadRequest for the first field that is wrong."""
        # webargs has wrapped the messages by location.
        messages: Any = error.messages
        ((_location, by_field),) = messages.items()
        raise BadRequest(_sentence(by_field, schema)) from error


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """A blueprint whose views read their arguments with our Parser."""

    ARGUMENTS_PARSER = Parser()


def _parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that the bytes are, by RFC 8259. Raises BadRequest."""
    if not data:
        raise BadRequest("The body is empty; send a JSON object.")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8: byte {error.start} cannot be decoded.") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from error
    except RecursionError as error:
        raise BadRequest("The body is nested too deeply.") from error
    except ValueError as error:
        # Python turns no more than 4300 digits into an integer.
        raise BadRequest("The body holds a number with too many digits.") from error
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises BadRequest where a name comes twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, count in names.items() if count > 1)
        raise BadRequest(f"The body has an object with two fields named {twice[:LONGEST_NAME]!r}.")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"The body is not JSON: {name} is no JSON number.")


def _sentence(by_field: Mapping[Any, Any], schema: Schema) -> str:
    field, message = next(iter(by_field.items()))
    while isinstance(message, Mapping):
        key, message = next(iter(message.items()))
        field = f"{field}.{key}"
    rule = message[0] if isinstance(message, list) else message
    name = str(field)[:LONGEST_NAME]
    if rule == "Unknown field.":
        rule += near(name, schema.fields) or f" Known: {', '.join(schema.fields)}."
    more = f" ({len(by_field) - 1} more)" if len(by_field) > 1 else ""
    return f"{name}: {rule}{more}"
