"""POST /v1/chat/completions: an llm job, or a vision job where a message has a picture."""

from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, pre_load, validate

from app.auth import requires
from app.keys import Scope
from app.openai import answers
from app.openai.calls import Call, CallHeaders, job_ids, params_for, run
from app.openai.chunks import stream
from app.openai.fields import Asked, Ignored, Unsupported
from app.openai.routes import STREAM, blueprint, states_server_errors
from app.parsing import refusal
from app.request import Request
from engines.catalogue import JobType
from engines.fields import Int, Text, Truth

#: Params that have the same name and meaning in a job.
SAME = ("temperature", "top_p", "seed", "stop", "n", "response_format", "logprobs", "top_logprobs")
#: Of these a question about a picture knows nothing; what they may be all the same.
NOT_OF_PICTURES: Mapping[str, tuple[Any, ...]] = {
    "stop": ([],),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
#: Roles of OpenAI's by ours.
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


class Content(fields.Field[list[dict[str, Any]]]):
    """A text, or a list of parts that are texts and pictures; loads as parts."""

    def __init__(self) -> None:
        texts = {"type": "string"}
        parts = {"type": "array", "items": {"type": "object"}}
        super().__init__(required=True, metadata={"oneOf": [texts, parts], "description": "Text and picture parts."})

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        if isinstance(value, str):
            return [{"text": _text(value)}]
        if not isinstance(value, list) or not value:
            raise ValidationError("Must be a string or a list of parts.")
        return [_part(part) for part in value]


def _text(value: Any) -> str:
    return str(Text().deserialize(value))


def _part(part: Any) -> dict[str, str]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"text": _text(text)}
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            if not url.startswith("data:"):
                raise ValidationError(
                    "Only data: URLs: no picture is fetched from elsewhere. Send data:image/png;base64,..."
                )
            return {"picture": url}
        case {"type": "text" | "image_url"}:
            raise ValidationError('Must be {"type": "text", "text"} or {"type": "image_url", "image_url": {"url"}}.')
        case _:
            raise ValidationError("Only parts of type text and image_url.")


class ChatMessage(Schema):
    """One turn of a conversation."""

    class Meta:
        unknown = RAISE

    role = fields.String(
        required=True,
        validate=validate.OneOf(list(ROLES), error="Must be one of: {choices}. Tools are not supported."),
    )
    content = Content()
    name = Ignored()
    tool_calls = Unsupported([], why="Tools are not supported.")
    tool_call_id = Unsupported(why="Tools are not supported.")
    function_call = Unsupported(why="Tools are not supported.")
    audio = Unsupported()
    refusal = Unsupported()

    @pre_load
    def _without_nulls(self, data: Any, **_: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Schema):
    """What a stream tells beside the text."""

    class Meta:
        unknown = RAISE

    include_usage = Truth(load_default=False)
    include_obfuscation = Ignored()


class Streamed(Asked):
    """What may be answered by a stream."""

    stream = Truth(load_default=False)
    stream_options = fields.Nested(StreamOptions, metadata={"description": "Only with stream: true."})

    @post_load
    def _told(self, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        options = data.pop("stream_options", None)
        if options is not None and not data["stream"]:
            raise ValidationError("Only with stream: true.", "stream_options")
        return {**data, "include_usage": bool(options and options["include_usage"])}


class ChatCreate(Streamed):
    """A conversation to go on with."""

    messages = fields.List(fields.Nested(ChatMessage), required=True, validate=validate.Length(min=1, max=1024))
    max_tokens = Int(metadata={"description": "Of each answer."})
    max_completion_tokens = Int(metadata={"description": "The same; it goes before max_tokens."})
    temperature = fields.Raw(metadata={"type": "number"})
    top_p = fields.Raw(metadata={"type": "number"})
    seed = fields.Raw(metadata={"type": "integer"})
    stop = fields.Raw(metadata={"description": "A string or a list of them."})
    n = fields.Raw(metadata={"type": "integer"})
    response_format = fields.Raw(metadata={"type": "object", "description": "text, json_object or json_schema."})
    logprobs = fields.Raw(metadata={"type": "boolean"})
    top_logprobs = fields.Raw(metadata={"type": "integer"})
    metadata = Ignored()
    store = Ignored()
    service_tier = Ignored()
    prompt_cache_key = Ignored()
    prompt_cache_retention = Ignored()
    prediction = Ignored()
    parallel_tool_calls = Ignored()
    tools = Unsupported([], why="Tools are not supported.")
    tool_choice = Unsupported("none", "auto", why="Tools are not supported.")
    functions = Unsupported([], why="Tools are not supported.")
    function_call = Unsupported("none", "auto", why="Tools are not supported.")
    frequency_penalty = Unsupported(0, 0.0, why="Penalties are not supported.")
    presence_penalty = Unsupported(0, 0.0, why="Penalties are not supported.")
    logit_bias = Unsupported({})
    modalities = Unsupported(["text"], why="Answers are text.")
    audio = Unsupported(why="Answers are text.")
    reasoning_effort = Unsupported()
    verbosity = Unsupported()
    web_search_options = Unsupported()


@blueprint.post("/chat/completions")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(ChatCreate())
@blueprint.response(200, answers.ChatCompletion)
@blueprint.alt_response(200, schema=STREAM, content_type="text/event-stream", success=True)
@states_server_errors
def create_chat(call: Call, asked: dict[str, Any]) -> Any:
    """Go on with a conversation.

    A picture in a message makes it a question to a vision model.
    """
    wanted = _wanted(call, asked)
    if asked["stream"]:
        return stream(call, wanted, answers.chat_chunks(asked["model"]), include_usage=asked["include_usage"])
    done = run(call, [wanted])
    return answers.chat(done[0]), 200, job_ids(done)


def _wanted(call: Call, asked: Mapping[str, Any]) -> Request:
    """The job that answers the conversation."""
    max_tokens = asked.get("max_completion_tokens", asked.get("max_tokens"))
    names = {"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in asked else {}
    turns = [(ROLES[message["role"]], message["content"]) for message in asked["messages"]]
    same = {name: asked.get(name) for name in SAME}
    if not any("picture" in part for _, parts in turns for part in parts):
        messages = [{"role": role, "content": "\n".join(part["text"] for part in parts)} for role, parts in turns]
        params = params_for(JobType.LLM, {**same, "messages": messages, "max_tokens": max_tokens}, names)
        return call.asks(JobType.LLM, asked["model"], params)
    for name, neutral in NOT_OF_PICTURES.items():
        value = same.pop(name)
        if value is not None and not any(value == known and type(value) is type(known) for known in neutral):
            raise refusal({name: ["Not supported where a message has a picture."]})
    picture, question = _question(turns)
    about = {"image_base64": picture, "question": question, "task": "image_qa" if question else "image_caption"}
    names |= {"image_base64": "messages", "question": "messages"}
    params = params_for(JobType.VISION, {**same, **about, "max_tokens": max_tokens}, names)
    return call.asks(JobType.VISION, asked["model"], params)


def _question(turns: list[tuple[str, list[dict[str, str]]]]) -> tuple[str, str | None]:
    """The one picture of a conversation, and what is asked of it; None where nothing is. Raises Invalid."""
    pictures = [part["picture"] for _, parts in turns for part in parts if "picture" in part]
    if len(pictures) > 1:
        raise refusal({"messages": ["Only one picture in all."]})
    if any(role == "assistant" for role, _ in turns):
        raise refusal({"messages": ["A question about a picture has no turns of an assistant before it."]})
    texts = [part["text"] for _, parts in turns for part in parts if part.get("text")]
    return pictures[0], "\n".join(texts) or None
