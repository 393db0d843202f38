"""POST /v1/embeddings: an embedding job."""

import base64
import struct
from collections.abc import Sequence
from typing import Any

from marshmallow import Schema, fields, validate

from app.auth import requires
from app.keys import Scope
from app.openai.answers import TokenUsage
from app.openai.calls import Call, CallHeaders, job_ids, params_for, run
from app.openai.completions import Prompts
from app.openai.fields import Asked, Unsupported
from app.openai.routes import blueprint, states_server_errors
from engines.catalogue import JobType
from engines.schemas import EmbeddingParams

_input: Any = EmbeddingParams._declared_fields["input"]


class EmbeddingCreate(Asked):
    """Texts to make vectors of."""

    input = Prompts(
        required=True,
        least=_input.least,
        most=_input.most,
        longest=_input.longest,
        most_together=_input.most_together,
        metadata={"description": "A text, or a list of them."},
    )
    encoding_format = fields.String(load_default="float", validate=validate.OneOf(["float", "base64"]))
    dimensions = Unsupported(why="Vectors have the model's own number of dimensions.")
    input_type = fields.Raw(metadata={"type": "string", "description": "query or passage; not OpenAI's."})
    truncate = fields.Raw(metadata={"type": "boolean", "description": "Cut texts that are too long; not OpenAI's."})


class EmbeddingView(Schema):
    """One text's vector."""

    object = fields.String(required=True, metadata={"example": "embedding"})
    index = fields.Integer(required=True)
    embedding = fields.Raw(
        required=True,
        metadata={
            "oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}],
            "description": "Numbers, or Base64 of little-endian float32.",
        },
    )


class EmbeddingList(Schema):
    """Vectors, in the order of the texts."""

    object = fields.String(required=True, metadata={"example": "list"})
    data = fields.List(fields.Nested(EmbeddingView), required=True)
    model = fields.String(required=True)
    usage = fields.Nested(TokenUsage, required=True)


@blueprint.post("/embeddings")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(EmbeddingCreate())
@blueprint.response(200, EmbeddingList)
@states_server_errors
def create_embeddings(call: Call, asked: dict[str, Any]) -> Any:
    """Make vectors of texts."""
    params = {name: asked.get(name) for name in ("input", "input_type", "truncate")}
    done = run(call, [call.asks(JobType.EMBEDDING, asked["model"], params_for(JobType.EMBEDDING, params))])
    result = done[0].result
    packed = asked["encoding_format"] == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": pack(vector) if packed else vector}
        for index, vector in enumerate(result["embeddings"])
    ]
    answer = {"object": "list", "data": data, "model": result["model"], "usage": result["usage"]}
    return answer, 200, job_ids(done)


def pack(vector: Sequence[float]) -> str:
    """Base64 of the numbers as little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
