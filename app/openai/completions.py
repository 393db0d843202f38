"""POST /v1/completions, OpenAI's older form: each prompt is an llm job with one message."""

from typing import Any

from marshmallow import ValidationError, fields, validate

from app.auth import requires
from app.keys import Scope
from app.openai import answers
from app.openai.calls import Call, CallHeaders, job_ids, params_for, run
from app.openai.chat import Streamed
from app.openai.chunks import stream
from app.openai.fields import Unsupported
from app.openai.routes import STREAM, blueprint, states_server_errors
from app.parsing import refusal
from engines.catalogue import JobType
from engines.fields import Int, StringOrList

SAME = ("max_tokens", "temperature", "top_p", "seed", "stop", "n")
MOST_PROMPTS = 16
MOST_TOP_LOGPROBS = 5


class Prompts(StringOrList):
    """A text or a list of them."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[str]:
        if isinstance(value, list) and value and not any(isinstance(entry, str) for entry in value):
            raise ValidationError("Token ids are not taken, since models differ in them: send text.")
        return super()._deserialize(value, *args, **kwargs)


class CompletionCreate(Streamed):
    """Prompts to answer."""

    prompt = Prompts(required=True, least=1, most=MOST_PROMPTS, longest=1_000_000)
    max_tokens = fields.Raw(metadata={"type": "integer"})
    temperature = fields.Raw(metadata={"type": "number"})
    top_p = fields.Raw(metadata={"type": "number"})
    seed = fields.Raw(metadata={"type": "integer"})
    stop = fields.Raw(metadata={"description": "A string or a list of them."})
    n = fields.Raw(metadata={"type": "integer"})
    logprobs = Int(
        validate=validate.Range(min=0, max=MOST_TOP_LOGPROBS),
        metadata={"description": "Tell the log probability of each token, and of so many others in its place."},
    )
    best_of = Unsupported(1)
    echo = Unsupported(False, why="Prompts are not repeated.")
    suffix = Unsupported(why="Nothing can be inserted.")
    frequency_penalty = Unsupported(0, 0.0, why="Penalties are not supported.")
    presence_penalty = Unsupported(0, 0.0, why="Penalties are not supported.")
    logit_bias = Unsupported({})


@blueprint.post("/completions")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(CompletionCreate())
@blueprint.response(200, answers.TextCompletion)
@blueprint.alt_response(200, schema=STREAM, content_type="text/event-stream", success=True)
@states_server_errors
def create_completion(call: Call, asked: dict[str, Any]) -> Any:
    """Answer prompts, each as a conversation of one message."""
    top = asked.get("logprobs")
    same = {name: asked.get(name) for name in SAME} | {"logprobs": top is not None, "top_logprobs": top}
    wanted = [
        call.asks(
            JobType.LLM,
            asked["model"],
            params_for(
                JobType.LLM,
                {**same, "messages": [{"role": "user", "content": prompt}]},
                {"messages": "prompt", "top_logprobs": "logprobs"},
            ),
        )
        for prompt in asked["prompt"]
    ]
    if asked["stream"]:
        if len(wanted) > 1:
            raise refusal({"prompt": ["Only one with stream: true."]})
        return stream(call, wanted[0], answers.text_chunks(asked["model"]), include_usage=asked["include_usage"])
    done = run(call, wanted)
    return answers.completion(done), 200, job_ids(done)
