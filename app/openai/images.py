"""POST /v1/images/generations: an image_gen job for each picture."""

import re
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate

from app.auth import requires
from app.keys import Scope
from app.openai.calls import Call, CallHeaders, job_ids, params_for, replaced, run
from app.openai.fields import Asked, Ignored, Unsupported
from app.openai.routes import blueprint, states_server_errors
from engines.catalogue import JobType
from engines.fields import Int, Text
from engines.schemas import MOST_SEED

SAME = ("prompt", "negative_prompt", "steps", "seed", "guidance_scale")
MOST_PICTURES = 10


class Size(fields.Field[tuple[int | None, int | None]]):
    """Width and height in pixels, as 1024x768; auto leaves them to the model."""

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[int | None, int | None]:
        if value == "auto":
            return None, None
        sides = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", value) if isinstance(value, str) else None
        if sides is None:
            raise ValidationError("Must be like 1024x1024, or auto.")
        return int(sides[1]), int(sides[2])


class ImageCreate(Asked):
    """A text to draw."""

    model = Text(load_default="image_gen", metadata={"description": "Left out, any model."})
    prompt = fields.Raw(required=True, metadata={"type": "string"})
    n = Int(load_default=1, validate=validate.Range(min=1, max=MOST_PICTURES))
    size = Size(load_default=(None, None), metadata={"type": "string", "example": "1024x1024"})
    response_format = fields.String(
        load_default="b64_json",
        validate=validate.Equal("b64_json", error="Only b64_json: pictures are in the answer, not at a URL."),
    )
    negative_prompt = fields.Raw(metadata={"type": "string", "description": "Not OpenAI's."})
    steps = fields.Raw(metadata={"type": "integer", "description": "Not OpenAI's."})
    seed = Int(
        validate=validate.Range(min=0, max=MOST_SEED),
        metadata={"description": "Of the first picture, the next has seed + 1; not OpenAI's."},
    )
    guidance_scale = fields.Raw(metadata={"type": "number", "description": "Not OpenAI's."})
    moderation = Ignored()
    quality = Unsupported("auto", "standard", why="Use `steps`.")
    style = Unsupported(why="Say it in the prompt.")
    background = Unsupported("auto", "opaque")
    output_format = Unsupported("png")
    output_compression = Unsupported(100)
    stream = Unsupported(False)
    partial_images = Unsupported(0)


class ImageView(Schema):
    """One picture."""

    b64_json = fields.String(required=True, metadata={"description": "PNG."})
    seed = fields.Integer(metadata={"description": "Draws the same picture again."})


class ImageList(Schema):
    """Pictures."""

    created = fields.Integer(required=True, metadata={"description": "Unix seconds."})
    data = fields.List(fields.Nested(ImageView), required=True)
    model = fields.String()
    size = fields.String(metadata={"example": "1024x1024"})
    output_format = fields.String(metadata={"example": "png"})


@blueprint.post("/images/generations")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(ImageCreate())
@blueprint.response(200, ImageList)
@states_server_errors
def create_images(call: Call, asked: dict[str, Any]) -> Any:
    """Draw pictures."""
    width, height = asked["size"]
    params = {name: asked.get(name) for name in SAME} | {"width": width, "height": height}
    first = call.asks(
        JobType.IMAGE_GEN,
        asked["model"],
        params_for(JobType.IMAGE_GEN, params, {"width": "size", "height": "size"}),
    )
    seed = asked.get("seed")
    done = run(
        call,
        [
            first if seed is None or not number else replaced(first, seed=(seed + number) % (MOST_SEED + 1))
            for number in range(asked["n"])
        ],
    )
    results = [one.result for one in done]
    answer = {
        "created": int(done[0].row.created_at),
        "data": [{"b64_json": result["image_base64"], "seed": result["seed"]} for result in results],
        "model": results[0]["model"],
        "size": f"{results[0]['width']}x{results[0]['height']}",
        "output_format": "png",
    }
    return answer, 200, job_ids(done)
