"""Params and results per job type: with engines/*/schemas.py the only place with defaults and ranges.

Loading refuses unknown fields, strings where numbers are due, text that is no Unicode, and files that are not what
they should be. What depends on the model (its own steps, its context) is left null here and settled by the engine.
"""

from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from engines import media
from engines.catalogue import JobType
from engines.comfyui.schemas import ComfyuiParams, ComfyuiResult
from engines.fields import File, Int, Number, StringOrList, Text, Truth
from engines.languages import LANGUAGES
from engines.triton.schemas import TritonParams, TritonResult

#: Largest seed: JSON numbers are exact up to here in every client's language.
MOST_SEED = 2**53 - 1
#: Of a conversation; no model of the catalogue reads more tokens than about a tenth of it.
MOST_CHARACTERS = 1_000_000


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

    @validates_schema
    def _length(self, data: Mapping[str, Any], **_: Any) -> None:
        if sum(len(message["content"]) for message in data["messages"]) > MOST_CHARACTERS:
            raise ValidationError(f"At most {MOST_CHARACTERS} characters in all.", "messages")


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
    warnings = fields.List(fields.String())


_side = {"load_default": None, "allow_none": True}


class ImageGenParams(Schema):
    """What a picture is drawn from. Sizes in pixels; what is left out is what the model draws best."""

    class Meta:
        unknown = RAISE

    prompt = Text(required=True, validate=validate.Length(min=1, max=8000))
    negative_prompt = Text(load_default="", allow_none=True, validate=validate.Length(max=8000))
    width = Int(**_side, validate=validate.Range(min=64, max=4096))
    height = Int(**_side, validate=validate.Range(min=64, max=4096))
    steps = Int(load_default=None, allow_none=True, validate=validate.Range(min=1, max=150))
    guidance_scale = Number(load_default=None, allow_none=True, validate=validate.Range(min=0, max=30))
    seed = Int(load_default=None, allow_none=True, validate=validate.Range(min=0, max=MOST_SEED))

    @validates_schema(skip_on_field_errors=False)
    def _sides(self, data: Mapping[str, Any], **_: Any) -> None:
        # Every model's step is a multiple of this one; the engine checks its own.
        odd = {side: ["Must be a multiple of 8."] for side in ("width", "height") if (data.get(side) or 0) % 8}
        if odd:
            raise ValidationError(odd)


class ImageGenResult(Schema):
    """A picture."""

    image_base64 = fields.String(required=True)
    width = fields.Integer(required=True)
    height = fields.Integer(required=True)
    seed = fields.Integer(required=True)
    format = fields.String(required=True, validate=validate.OneOf(["png"]))
    steps = fields.Integer(required=True)
    guidance_scale = fields.Float(required=True)
    model = fields.String(required=True)
    warnings = fields.List(fields.String())


#: What can be asked of a picture.
VISION_TASKS = ("image_qa", "image_caption", "ocr")


class VisionParams(Schema):
    """What a picture is asked."""

    class Meta:
        unknown = RAISE

    image_base64 = File(media.check_picture, media.MOST_PICTURE_BYTES, required=True)
    task = fields.String(load_default="image_qa", validate=validate.OneOf(VISION_TASKS))
    question = Text(load_default=None, allow_none=True, validate=validate.Length(min=1, max=8000))
    max_tokens = Int(load_default=1024, validate=validate.Range(min=1, max=131_072))

    @validates_schema
    def _question(self, data: Mapping[str, Any], **_: Any) -> None:
        if data["task"] == "image_qa" and data["question"] is None:
            raise ValidationError("Needed for image_qa.", "question")


class VisionResult(Schema):
    """What a picture shows."""

    response = fields.String(required=True)
    task = fields.String(required=True, validate=validate.OneOf(VISION_TASKS))
    finish_reason = fields.String(required=True, validate=validate.OneOf(["stop", "length"]))
    model = fields.String(required=True)
    usage = fields.Nested(Usage, required=True)
    warnings = fields.List(fields.String())


class Language(fields.String):
    """A language's ISO 639 code, as Whisper knows it."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        code = super()._deserialize(value, attr, data, **kwargs).lower()
        if code not in LANGUAGES:
            raise ValidationError("Unknown language: give a code such as zh, en, ja, or leave it out to detect it.")
        return code


class WhisperParams(Schema):
    """What speech is written down from."""

    class Meta:
        unknown = RAISE

    audio_base64 = File(media.sound_kind, media.MOST_SOUND_BYTES, required=True)
    language = Language(load_default=None, allow_none=True)
    task = fields.String(load_default="transcribe", validate=validate.OneOf(["transcribe", "translate"]))


class Segment(Schema):
    """A stretch of speech; times in seconds from the beginning."""

    id = fields.Integer(required=True)
    start = fields.Float(required=True)
    end = fields.Float(required=True)
    text = fields.String(required=True)


class WhisperResult(Schema):
    """What was said."""

    text = fields.String(required=True)
    language = fields.String(required=True)
    duration = fields.Float(required=True)
    segments = fields.List(fields.Nested(Segment), required=True)
    task = fields.String(required=True)
    model = fields.String(required=True)
    warnings = fields.List(fields.String())


class EmbeddingParams(Schema):
    """What vectors are made of."""

    class Meta:
        unknown = RAISE

    input = StringOrList(
        required=True,
        least=1,
        most=2048,
        longest=65_536,
        most_together=2_000_000,
        metadata={"description": "A text, or a list of them."},
    )
    input_type = fields.String(
        load_default="passage",
        validate=validate.OneOf(["query", "passage"]),
        metadata={"description": "Some models read what is searched for otherwise than what is found."},
    )
    truncate = Truth(
        load_default=False,
        metadata={"description": "Cut a text that is longer than the model reads; false refuses it."},
    )


class EmbeddingUsage(Schema):
    """Tokens of what was read."""

    prompt_tokens = fields.Integer(required=True)
    total_tokens = fields.Integer(required=True)


class EmbeddingResult(Schema):
    """Vectors of length 1, in the order of the texts."""

    embeddings = fields.List(fields.List(fields.Float()), required=True)
    dimensions = fields.Integer(required=True)
    model = fields.String(required=True)
    usage = fields.Nested(EmbeddingUsage, required=True)
    warnings = fields.List(fields.String())


#: The params each job type takes, and the result each gives.
PARAMS: Mapping[JobType, Schema] = {
    JobType.LLM: LlmParams(),
    JobType.IMAGE_GEN: ImageGenParams(),
    JobType.VISION: VisionParams(),
    JobType.WHISPER: WhisperParams(),
    JobType.EMBEDDING: EmbeddingParams(),
    JobType.COMFYUI: ComfyuiParams(),
    JobType.TRITON: TritonParams(),
}
RESULTS: Mapping[JobType, Schema] = {
    JobType.LLM: LlmResult(),
    JobType.IMAGE_GEN: ImageGenResult(),
    JobType.VISION: VisionResult(),
    JobType.WHISPER: WhisperResult(),
    JobType.EMBEDDING: EmbeddingResult(),
    JobType.COMFYUI: ComfyuiResult(),
    JobType.TRITON: TritonResult(),
}


def load_params(job_type: JobType, params: Mapping[str, Any]) -> dict[str, Any]:
    """Validated params with every default filled in. Raises marshmallow's ValidationError by field."""
    loaded: dict[str, Any] = PARAMS[job_type].load(params)
    return loaded
