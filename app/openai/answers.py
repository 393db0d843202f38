"""What a job of text gave, in OpenAI's shapes: whole, and in the chunks of a stream."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from marshmallow import Schema, fields

from app.job_table import JobRow
from app.openai.calls import Done

Logprobs = Sequence[Mapping[str, Any]]


class TokenUsage(Schema):
    """Tokens of one call."""

    prompt_tokens = fields.Integer(required=True)
    completion_tokens = fields.Integer()
    total_tokens = fields.Integer(required=True)


class Completion(Schema):
    """What every answer of text has."""

    id = fields.String(required=True, metadata={"description": "Ends in the job's id."})
    object = fields.String(required=True)
    created = fields.Integer(required=True, metadata={"description": "Unix seconds."})
    model = fields.String(required=True, metadata={"description": "The model that ran."})
    usage = fields.Nested(TokenUsage, required=True)


class ChatMessageView(Schema):
    """What the model says."""

    role = fields.String(required=True, metadata={"example": "assistant"})
    content = fields.String(required=True)
    refusal = fields.String(allow_none=True)


class ChatChoice(Schema):
    """One answer."""

    index = fields.Integer(required=True)
    message = fields.Nested(ChatMessageView, required=True)
    logprobs = fields.Raw(allow_none=True, metadata={"type": "object", "nullable": True})
    finish_reason = fields.String(required=True, metadata={"example": "stop"})


class ChatCompletion(Completion):
    """Answers to a conversation."""

    choices = fields.List(fields.Nested(ChatChoice), required=True)


class TextChoice(Schema):
    """One answer."""

    index = fields.Integer(required=True)
    text = fields.String(required=True)
    logprobs = fields.Raw(allow_none=True, metadata={"type": "object", "nullable": True})
    finish_reason = fields.String(required=True, metadata={"example": "stop"})


class TextCompletion(Completion):
    """Answers to prompts."""

    choices = fields.List(fields.Nested(TextChoice), required=True)


class Chunks(Protocol):
    """How the chunks of a stream look."""

    def head(self, row: JobRow) -> dict[str, Any]:
        """What every chunk has."""

    def opening(self) -> Mapping[str, Any]:
        """What a choice begins with; nothing if it begins with its text."""

    def text(self, delta: str, logprobs: Logprobs, offset: int) -> Mapping[str, Any]:
        """What a choice has for more text; offset: characters before it."""

    def closing(self) -> Mapping[str, Any]:
        """What a choice that has ended has, beside its finish_reason."""


def chat(done: Done) -> dict[str, Any]:
    """A job's answers as a chat completion."""
    return {
        **_head(done.row, "chatcmpl", "chat.completion", done.result["model"]),
        "choices": [
            {
                "index": choice["index"],
                "message": {"role": "assistant", "content": choice["response"], "refusal": None},
                "logprobs": _chat_logprobs(choice["logprobs"]),
                "finish_reason": choice["finish_reason"],
            }
            for choice in choices_of(done.result)
        ],
        "usage": done.result["usage"],
    }


def completion(done: Sequence[Done]) -> dict[str, Any]:
    """The answers of the jobs of one call, a job for each prompt, as a text completion."""
    every = [choice for one in done for choice in choices_of(one.result)]
    return {
        **_head(done[0].row, "cmpl", "text_completion", done[0].result["model"]),
        "choices": [
            {
                "index": index,
                "text": choice["response"],
                "logprobs": _text_logprobs(choice["logprobs"], 0),
                "finish_reason": choice["finish_reason"],
            }
            for index, choice in enumerate(every)
        ],
        "usage": total(one.result["usage"] for one in done),
    }


def total(usages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Several jobs' tokens together."""
    summed: dict[str, int] = {}
    for usage in usages:
        for name, count in usage.items():
            summed[name] = summed.get(name, 0) + count
    return summed


def choices_of(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every answer of a job of text, as LlmResult has them."""
    only = {"index": 0, "response": result["response"], "finish_reason": result["finish_reason"], "logprobs": None}
    return list(result.get("choices") or [only])


def chat_chunks(model: str) -> Chunks:
    """The chunks of a chat completion. model: as the client named it; which one ran is known only at the end."""
    return _ChatChunks(model)


def text_chunks(model: str) -> Chunks:
    """The chunks of a text completion."""
    return _TextChunks(model)


class _ChatChunks:
    def __init__(self, model: str) -> None:
        self._model = model

    def head(self, row: JobRow) -> dict[str, Any]:
        return _head(row, "chatcmpl", "chat.completion.chunk", row.model or self._model)

    def opening(self) -> Mapping[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def text(self, delta: str, logprobs: Logprobs, offset: int) -> Mapping[str, Any]:
        return {"delta": {"content": delta}, "logprobs": _chat_logprobs(logprobs or None)}

    def closing(self) -> Mapping[str, Any]:
        return {"delta": {}, "logprobs": None}


class _TextChunks:
    def __init__(self, model: str) -> None:
        self._model = model

    def head(self, row: JobRow) -> dict[str, Any]:
        return _head(row, "cmpl", "text_completion", row.model or self._model)

    def opening(self) -> Mapping[str, Any]:
        return {}

    def text(self, delta: str, logprobs: Logprobs, offset: int) -> Mapping[str, Any]:
        return {"text": delta, "logprobs": _text_logprobs(logprobs or None, offset)}

    def closing(self) -> Mapping[str, Any]:
        return {"text": "", "logprobs": None}


def _head(row: JobRow, prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{row.id}", "object": kind, "created": int(row.created_at), "model": model}


def _chat_logprobs(told: Logprobs | None) -> dict[str, Any] | None:
    return None if told is None else {"content": list(told), "refusal": None}


def _text_logprobs(told: Logprobs | None, offset: int) -> dict[str, Any] | None:
    """The older form: a list for each member. offset: characters of the answer before the first token."""
    if told is None:
        return None
    offsets = []
    for entry in told:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in told],
        "token_logprobs": [entry["logprob"] for entry in told],
        "top_logprobs": [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in told],
        "text_offset": offsets,
    }
