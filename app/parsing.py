"""Reading requests: strict JSON, and refusals that name the field, the rule and the near names."""

from collections.abc import Mapping
from typing import Any, NoReturn

import flask_smorest
from flask import Request
from marshmallow import RAISE, Schema, ValidationError
from webargs.flaskparser import FlaskParser

from app.errors import Invalid, MalformedBody, NotJson
from tasks import reading


class Parser(FlaskParser):  # type: ignore[misc]
    """webargs with our JSON and our refusals."""

    DEFAULT_UNKNOWN_BY_LOCATION = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}

    def load_json(self, req: Request, schema: Schema) -> dict[str, Any]:
        """The body's JSON object. Raises NotJson or MalformedBody."""
        # A body without a type is let through, for the sake of bare HTTP clients; the Guard has seen its origin.
        if req.mimetype and not req.is_json:
            raise NotJson(f"The body must be JSON: send Content-Type: application/json, not {req.mimetype[:64]!r}.")
        try:
            return reading.parse_object(req.get_data(cache=False))
        except reading.NotAnObject as error:
            raise MalformedBody(str(error)) from error

    def load_querystring(self, req: Request, schema: Schema) -> Any:
        """The query's parameters. Raises Invalid for one that is given twice: no view takes several values."""
        if twice := {name: ["Given more than once."] for name, values in req.args.lists() if len(values) > 1}:
            raise Invalid(twice)
        return super().load_querystring(req, schema)

    def handle_error(self, error: ValidationError, req: Request, schema: Schema, **_: Any) -> NoReturn:
        """Raises Invalid."""
        # webargs has wrapped the messages by location.
        ((_location, messages),) = reading.as_mapping(error).items()
        raise refusal(reading.hinted(messages, schema)) from error


class Blueprint(flask_smorest.Blueprint):  # type: ignore[misc]
    """A blueprint whose views read their arguments with our Parser."""

    ARGUMENTS_PARSER = Parser()


def refusal(messages: Mapping[Any, Any]) -> Invalid:
    """marshmallow's nested messages as one error, by dotted path."""
    errors, left_out = reading.by_path(messages)
    return Invalid(errors, left_out=left_out)
