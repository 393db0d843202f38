"""Params and results per job type: the only place with defaults and ranges.

Loading refuses unknown fields, strings where numbers are due, and text that is no Unicode.
"""

from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from engines.catalogue import JobType


class Text(fields.String):
    """A string that UTF-8 can carry: lone surrogates, legal in JSON, break every tokenizer and database."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text: str = super()._deserialize(value, attr, data, **kwargs)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValidationError("Not valid Unicode: a surrogate stands alone.") from error
        return text


class Int(fields.Integer):
    """A JSON integer; "5", 5.5 and true are refused."""

    def _validated(self, value: Any) -> int:
        if isinstance(value, (bool, str)):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(strict=True, **kwargs)


class Number(fields.Float):
    """A finite JSON number; "0.7" and true are refused."""

    def _validated(self, value: Any) -> float:
        if isinstance(value, (bool, str)):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class StringOrList(fields.Field[list[str]]):
    """One string or a list of them; loads as a list."""

    def __init__(self, *, most: int, longest: int, **kwargs: Any) -> None:
        shape = [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": most}]
        super().__init__(metadata={"oneOf": shape}, **kwargs)
        self.most = most
        self.longest = longest

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValidationError("Must be a string or a list of strings.")
        if len(items) > self.most:
            raise ValidationError(f"At most {self.most} strings.")
        if any(not 1 <= len(item) <= self.longest for item in items):
            raise ValidationError(f"Each string must have 1 to {self.longest} characters.")
        return [str(Text().deserialize(item)) for item in items]


class Message(Schema):
    """One turn of a conversation."""

    class Meta:
        unknown = RAISE

    role = fields.String(required=True, validate=validate.OneOf(["system", "user", "assistant"]))
    content = Text(required=True, validate=validate.Length(min=1))


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


class Usage(Schema):
    """Tokens of one answer."""

    prompt_tokens = fields.Integer(required=True)
    completion_tokens = fields.Integer(required=True)
    total_tokens = fields.Integer(required=True)


class LlmResult(Schema):
    """What a text generation gives."""

    response = fields.String(required=True)
    finish_reason = fields.String(required=True, validate=validate.OneOf(["stop", "length"]))
    model = fields.String(required=True)
    usage = fields.Nested(Usage, required=True)


#: The job types that can be asked for today, with the params each takes and the result each gives.
PARAMS: Mapping[JobType, Schema] = {JobType.LLM: LlmParams()}
RESULTS: Mapping[JobType, Schema] = {JobType.LLM: LlmResult()}


def load_params(job_type: JobType, params: Mapping[str, Any]) -> dict[str, Any]:
    """Validated params with every default filled in. Raises marshmallow's ValidationError by field."""
    loaded: dict[str, Any] = PARAMS[job_type].load(params)
    return loaded
