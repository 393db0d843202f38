"""Reading requests: strict JSON, and refusals that name the field, the rule and the near names."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import flask_smorest
from flask import Request
from marshmallow import RAISE, Schema, ValidationError, fields
from webargs.flaskparser import FlaskParser

from app.errors import Invalid, MalformedBody, NotJson

#: A refusal names at most this many fields, and cuts longer names: a megabyte of junk is not echoed.
MOST_ERRORS = 50
LONGEST_NAME = 100

_UNKNOWN_FIELD = "Unknown field."


class Parser(FlaskParser):  # type: ignore[misc]
    """webargs with our JSON and our refusals."""

    DEFAULT_UNKNOWN_BY_LOCATION = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}

    def load_json(self, req: Request, schema: Schema) -> dict[str, Any]:
        """The body's JSON object. Raises NotJson or MalformedBody."""
        # A body without a type is let through, for the sake of bare HTTP clients; the Guard has seen its origin.
        if req.mimetype and not req.is_json:
            raise NotJson(f"The body must be JSON: send Content-Type: application/json, not {req.mimetype[:64]!r}.")
        return parse_object(req.get_data(cache=False))

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **_: Any) -> NoReturn:
        """Raises Invalid."""
        # webargs has wrapped the messages by location.
        ((_location, messages),) = as_mapping(error).items()
        raise refusal(hinted(messages, schema)) from error


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """A blueprint whose views read their arguments with our Parser."""

    ARGUMENTS_PARSER = Parser()


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that the bytes are, by RFC 8259: UTF-8, no NaN, no Infinity. Raises MalformedBody."""
    if not data:
        raise MalformedBody("The body is empty; send a JSON object.")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body is not UTF-8: byte {error.start} cannot be decoded.") from error
    except json.JSONDecodeError as error:
        raise MalformedBody(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from error
    except RecursionError as error:
        raise MalformedBody("The body is nested too deeply.") from error
    except ValueError as error:
        # Python turns no more than 4300 digits into an integer.
        raise MalformedBody("The body holds a number with too many digits.") from error
    if not isinstance(value, dict):
        raise MalformedBody("The body must be a JSON object.")
    return value


def as_mapping(error: ValidationError) -> Mapping[Any, Any]:
    """A validation error's messages by field."""
    return error.messages if isinstance(error.messages, Mapping) else {"_schema": error.messages}


def hinted(messages: Mapping[Any, Any], schema: Schema) -> dict[Any, Any]:
    """marshmallow's messages with the near names beside every unknown field."""
    found: dict[Any, Any] = {}
    for name, message in messages.items():
        if message == [_UNKNOWN_FIELD]:
            found[name] = (
                [f"{_UNKNOWN_FIELD} {near(str(name), schema.fields)}"] if len(found) < MOST_ERRORS else message
            )
            continue
        field = schema.fields.get(name)
        inner = field.inner if isinstance(field, fields.List) else field
        if isinstance(message, Mapping) and isinstance(inner, fields.Nested):
            if inner is field:
                message = hinted(message, inner.schema)
            else:
                message = {
                    index: hinted(entry, inner.schema) if isinstance(entry, Mapping) else entry
                    for index, entry in message.items()
                }
        found[name] = message
    return found


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that look like `name`, or with all of them."""
    names = list(known)
    # The comparison takes quadratic time.
    close = difflib.get_close_matches(name, names, n=3) if len(name) <= LONGEST_NAME else []
    return f"Near: {', '.join(close)}." if close else f"Known: {', '.join(names)}."


def refusal(messages: Mapping[Any, Any]) -> Invalid:
    """marshmallow's nested messages as one error, by dotted path."""
    flat: dict[str, list[str]] = {}
    left_out = 0
    for path, message in _flatten(messages, ""):
        if path in flat:
            flat[path].append(message)
        elif len(flat) < MOST_ERRORS:
            flat[path] = [message]
        else:
            left_out += 1
    return Invalid(flat, left_out=left_out)


def _flatten(messages: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(messages, Mapping):
        for name, message in messages.items():
            # marshmallow files what concerns the whole object under _schema.
            own = "" if name == "_schema" else str(name)[:LONGEST_NAME]
            yield from _flatten(message, ".".join(filter(None, (path, own))))
    elif isinstance(messages, list):
        for message in messages:
            yield from _flatten(message, path)
    else:
        yield path or "body", str(messages)


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBody(f"The body is not JSON: {name} is no JSON number.")
