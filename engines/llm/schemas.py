"""What a text generation takes and gives."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from engines.fields import Int, Number, StringOrList, Text, Truth

#: Of a conversation; no model of the catalogue reads more tokens than about a tenth of it.
MOST_CHARACTERS = 1_000_000
#: Answers of one job.
MOST_CHOICES = 8
#: Alternatives of each token whose probabilities are told.
MOST_TOP_LOGPROBS = 20
#: Probabilities in one result: about 80 MB of JSON.
MOST_LOGPROBS = 1_000_000
#: A JSON schema as UTF-8 JSON, and objects and lists within each other in it.
MOST_SCHEMA_BYTES = 64 * 1024
MOST_SCHEMA_DEPTH = 64
#: Where a JSON schema holds plain values, in which "$ref" is a word like others.
VALUES = frozenset({"const", "default", "enum", "examples"})


class Message(Schema):
    """One turn of a conversation."""

    class Meta:
        unknown = RAISE

    role = fields.String(required=True, validate=validate.OneOf(["system", "user", "assistant"]))
    content = Text(required=True, validate=validate.Length(min=1))


class JsonSchema(fields.Dict):
    """A JSON schema that refers to nothing outside itself."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> Any:
        schema: dict[str, Any] = super()._deserialize(value, attr, data, **kwargs)  # type: ignore[no-untyped-call]
        # Before anything walks it by recursion.
        if _depth(schema) > MOST_SCHEMA_DEPTH:
            raise ValidationError(f"At most {MOST_SCHEMA_DEPTH} objects and lists within each other.")
        try:
            size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
        except UnicodeEncodeError as error:
            raise ValidationError("Not valid Unicode: a surrogate stands alone.") from error
        except ValueError as error:
            raise ValidationError("NaN and Infinity are no JSON.") from error
        if size > MOST_SCHEMA_BYTES:
            raise ValidationError(f"At most {MOST_SCHEMA_BYTES} bytes as JSON.")
        if remote := next((ref for ref in _references(schema) if not ref.startswith("#")), None):
            raise ValidationError(f"$ref {remote[:100]!r}: only references within the schema, which begin with #.")
        return schema


class NamedSchema(Schema):
    """A JSON schema as OpenAI wraps it."""

    class Meta:
        unknown = RAISE

    name = fields.String(
        required=True,
        validate=validate.Regexp(r"\A[A-Za-z0-9_-]{1,64}\Z", error="1 to 64 letters of ASCII, digits, _ or -."),
    )
    description = Text(load_default=None, allow_none=True, validate=validate.Length(max=8000))
    schema = JsonSchema(required=True)
    strict = Truth(
        load_default=True,
        allow_none=True,
        metadata={"description": "Answers keep to the schema whether this is true or false."},
    )


class ResponseFormat(Schema):
    """What form an answer has."""

    class Meta:
        unknown = RAISE

    type = fields.String(required=True, validate=validate.OneOf(["text", "json_object", "json_schema"]))
    json_schema = fields.Nested(NamedSchema)

    @validates_schema
    def _schema(self, data: Mapping[str, Any], **_: Any) -> None:
        if (data["type"] == "json_schema") != ("json_schema" in data):
            wrong = "Only with type json_schema." if "json_schema" in data else "Needed for type json_schema."
            raise ValidationError(wrong, "json_schema")


class LlmParams(Schema):
    """What a text generation takes."""

    class Meta:
        unknown = RAISE

    messages = fields.List(fields.Nested(Message), required=True, validate=validate.Length(min=1, max=1024))
    max_tokens = Int(load_default=2048, validate=validate.Range(min=1, max=131_072))
    temperature = Number(load_default=0.7, validate=validate.Range(min=0, max=2))
    top_p = Number(load_default=0.9, validate=validate.Range(min=0, min_inclusive=False, max=1))
    seed = Int(load_default=None, allow_none=True, validate=validate.Range(min=0, max=2**63 - 1))
    stop = StringOrList(load_default=list, most=4, longest=256)
    n = Int(
        load_default=1,
        validate=validate.Range(min=1, max=MOST_CHOICES),
        metadata={"description": "How many answers; with a seed the first is drawn with it, the next with seed + 1."},
    )
    response_format = fields.Nested(
        ResponseFormat,
        load_default=None,
        allow_none=True,
        metadata={"description": "The answer is JSON, of a schema if one is given; only max_tokens or stop cut it."},
    )
    logprobs = Truth(
        load_default=False,
        metadata={"description": "Tell the log probability of each token, before temperature and top_p."},
    )
    top_logprobs = Int(
        load_default=0,
        validate=validate.Range(min=0, max=MOST_TOP_LOGPROBS),
        metadata={"description": "With logprobs: and those of so many most probable tokens in its place."},
    )

    @validates_schema
    def _length(self, data: Mapping[str, Any], **_: Any) -> None:
        if sum(len(message["content"]) for message in data["messages"]) > MOST_CHARACTERS:
            raise ValidationError(f"At most {MOST_CHARACTERS} characters in all.", "messages")

    @validates_schema
    def _logprobs(self, data: Mapping[str, Any], **_: Any) -> None:
        if data["top_logprobs"] and not data["logprobs"]:
            raise ValidationError("Only with logprobs: true.", "top_logprobs")
        if data["logprobs"] and data["n"] * data["max_tokens"] * (data["top_logprobs"] + 1) > MOST_LOGPROBS:
            raise ValidationError(
                f"n * max_tokens * (top_logprobs + 1) must be at most {MOST_LOGPROBS}.", "top_logprobs"
            )


class Usage(Schema):
    """Tokens of what was read, once, and of all answers together."""

    prompt_tokens = fields.Integer(required=True)
    completion_tokens = fields.Integer(required=True)
    total_tokens = fields.Integer(required=True)


class Probable(Schema):
    """A token and its natural log probability, -9999 for one that is next to impossible."""

    #: U+FFFD stands for the bytes of a character that goes on in the next token.
    token = fields.String(required=True)
    logprob = fields.Float(required=True)
    bytes = fields.List(fields.Integer(), required=True)


class TokenLogprob(Probable):
    """A token of an answer, and what was most probable in its place."""

    top_logprobs = fields.List(fields.Nested(Probable), required=True)


class Choice(Schema):
    """One answer of a job."""

    index = fields.Integer(required=True)
    response = fields.String(required=True)
    finish_reason = fields.String(required=True, validate=validate.OneOf(["stop", "length"]))
    logprobs = fields.List(fields.Nested(TokenLogprob), required=True, allow_none=True)


class LlmResult(Schema):
    """What a text generation gives. Of several answers the first is `response`; `choices` has them all."""

    response = fields.String(required=True)
    finish_reason = fields.String(required=True, validate=validate.OneOf(["stop", "length"]))
    model = fields.String(required=True)
    usage = fields.Nested(Usage, required=True)
    choices = fields.List(
        fields.Nested(Choice), metadata={"description": "Only where the job asks for several answers or logprobs."}
    )
    warnings = fields.List(fields.String())


def _depth(value: Any) -> int:
    """Objects and lists within each other; stops counting beyond what is allowed."""
    level, depth = [value], 0
    while level and depth <= MOST_SCHEMA_DEPTH:
        level = [item for part in level if isinstance(part, dict | list) for item in _items(part)]
        depth += 1
    return depth


def _items(part: dict[str, Any] | list[Any]) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else part


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str):
                yield value
            elif key not in VALUES:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)
