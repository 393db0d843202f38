"""Reading what a client sends, the same in the API and in a direct worker: strict JSON, a job, words of refusal."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from engines.fields import Int, Number, Text, Truth
from engines.schemas import PARAMS, load_params
from tasks.routing import PRIORITIES

#: An hour of speech, as Base64 in JSON.
MOST_BODY_BYTES = 64 * 2**20
#: Longest time a job may run or wait; a day.
LONGEST_S = 86_400
#: A refusal names at most this many fields, and cuts longer names: a megabyte of junk is not echoed.
MOST_ERRORS = 50
LONGEST_NAME = 100
#: Objects and lists within one another; the deepest that a job needs, a tensor within its params, has about ten.
MOST_DEPTH = 32

_UNKNOWN_FIELD = "Unknown field."
_TOO_DEEP = f"The body is nested too deeply: at most {MOST_DEPTH} objects and lists within one another."


class NotAnObject(ValueError):
    """The bytes are no JSON object; the message says why not."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that the bytes are, by RFC 8259: UTF-8, no NaN, no Infinity, at most MOST_DEPTH deep.

    Raises NotAnObject.
    """
    if not data:
        raise NotAnObject("The body is empty; send a JSON object.")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise NotAnObject(f"The body is not UTF-8: byte {error.start} cannot be decoded.") from error
    except json.JSONDecodeError as error:
        raise NotAnObject(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from error
    except RecursionError as error:
        raise NotAnObject(_TOO_DEEP) from error
    except NotAnObject:
        raise
    except ValueError as error:
        # Python turns no more than 4300 digits into an integer.
        raise NotAnObject("The body holds a number with too many digits.") from error
    if not isinstance(value, dict):
        raise NotAnObject("The body must be a JSON object.")
    # The brackets are counted first: in megabytes of Base64 there are none, and nothing is walked through.
    if data.count(b"{") + data.count(b"[") > MOST_DEPTH and _is_deeper(value, MOST_DEPTH):
        raise NotAnObject(_TOO_DEEP)
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


def by_path(messages: Mapping[Any, Any]) -> tuple[dict[str, list[str]], int]:
    """marshmallow's nested messages by dotted path, and how many further fields are wrong."""
    flat: dict[str, list[str]] = {}
    left_out = 0
    for path, message in _flatten(messages, ""):
        if path in flat:
            flat[path].append(message)
        elif len(flat) < MOST_ERRORS:
            flat[path] = [message]
        else:
            left_out += 1
    return flat, left_out


def summary(errors: Mapping[str, Sequence[str]], left_out: int = 0) -> str:
    """The first error and how many more there are, as a sentence."""
    field, messages = next(iter(errors.items()))
    more = len(errors) - 1 + left_out
    return f"{field}: {messages[0]}" + (f" ({more} more)" if more else "")


class Params(fields.Dict):
    """Params of the job type that stands beside them."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValidationError("Must be an object.")
        job_type = next((known for known in PARAMS if data and data.get("type") == known), None)
        if job_type is None:
            # The type's own field refuses it.
            return value
        try:
            return load_params(job_type, value)
        except ValidationError as error:
            raise ValidationError(hinted(as_mapping(error), PARAMS[job_type])) from error


def check_type(name: str) -> None:
    """Raises ValidationError, with the near names, for what is no job type."""
    if name not in map(str, PARAMS):
        raise ValidationError(f"Unknown job type. {near(name, map(str, PARAMS))}")


_seconds = validate.Range(min=0, min_inclusive=False, max=LONGEST_S)


class JobFields(Schema):
    """A job that a client asks for; whether its region and model exist is for the reader to say."""

    class Meta:
        unknown = RAISE

    type = fields.String(
        required=True, validate=check_type, metadata={"enum": [str(name) for name in PARAMS], "example": "llm"}
    )
    params = Params(required=True, metadata={"description": "What the type takes."})
    model = Text(
        load_default=None,
        allow_none=True,
        validate=validate.Length(min=1, max=200),
        metadata={
            "description": "Only a worker that has this model loaded runs it (GET /api/v1/models); left out, any does.",
            "example": "Qwen/Qwen2.5-7B-Instruct",
        },
    )
    priority = Int(
        load_default=0,
        validate=validate.Range(min=PRIORITIES[0], max=PRIORITIES[-1]),
        metadata={"description": "Higher is sooner; first in first out within one."},
    )
    region = fields.String(
        load_default=None,
        allow_none=True,
        metadata={"example": "asia-east", "description": "Preferred region; left out, the platform chooses."},
    )
    allow_cross_region = Truth(
        load_default=True,
        metadata={"description": "Whether the nearest other region may run it when the preferred one cannot."},
    )
    timeout_seconds = Number(
        load_default=300.0, validate=_seconds, metadata={"description": "How long it may run, from its start."}
    )
    queue_timeout_seconds = Number(
        load_default=None,
        allow_none=True,
        validate=_seconds,
        metadata={"description": "How long it may wait; left out, for as long as it takes."},
    )


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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises NotAnObject where a name comes twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, count in names.items() if count > 1)
        raise NotAnObject(f"The body has an object with two fields named {twice[:LONGEST_NAME]!r}.")
    return found


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists lie more than depth deep, the value itself being the first."""
    level = [value]
    for _ in range(depth):
        level = [
            entry
            for node in level
            for entry in (node.values() if isinstance(node, dict) else node)
            if isinstance(entry, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise NotAnObject(f"The body is not JSON: {name} is no JSON number.")
