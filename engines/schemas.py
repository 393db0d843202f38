"""Params and results per job type: with engines/*/schemas.py the only place with defaults and ranges.

Loading refuses unknown fields, strings where numbers are due, text that is no Unicode, and files that are not what
they should be. What depends on the model (its own steps, its context) is left null here and settled by the engine.
"""

from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, missing, validate, validates_schema

from engines import media
from engines.catalogue import JobType
from engines.comfyui.schemas import ComfyuiParams, ComfyuiResult
from engines.fields import File, Int, Number, StringOrList, Text, Truth
from engines.languages import LANGUAGES
from engines.llm.schemas import LlmParams, LlmResult, Usage
from engines.triton.schemas import TritonParams, TritonResult

#: Largest seed: JSON numbers are exact up to here in every client's language.
MOST_SEED = 2**53 - 1


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
    temperature = Number(
        load_default=0,
        validate=validate.Range(min=0, max=2),
        metadata={"description": "0 takes the most probable token at each step."},
    )
    top_p = Number(load_default=1, validate=validate.Range(min=0, min_inclusive=False, max=1))
    seed = Int(load_default=None, allow_none=True, validate=validate.Range(min=0, max=2**63 - 1))

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
    prompt = Text(
        load_default=None,
        allow_none=True,
        validate=validate.Length(min=1, max=8000),
        metadata={"description": "What was said before, or names and words to spell so; its last 223 tokens are read."},
    )
    temperature = Number(
        load_default=0,
        validate=validate.Range(min=0, max=1),
        metadata={"description": "Where sampling begins; text that is improbable is sampled again 0.2 higher, to 1."},
    )
    word_timestamps = Truth(load_default=False, metadata={"description": "Tell when each word was said."})


class Segment(Schema):
    """A stretch of speech; times in seconds from the beginning.

    Of the window of 30 s that it was heard in: `seek` (where it begins, in hundredths of a second), temperature,
    avg_logprob (mean log probability of its tokens), compression_ratio and no_speech_prob.
    """

    id = fields.Integer(required=True)
    start = fields.Float(required=True)
    end = fields.Float(required=True)
    text = fields.String(required=True)
    seek = fields.Integer()
    tokens = fields.List(fields.Integer())
    temperature = fields.Float()
    avg_logprob = fields.Float()
    compression_ratio = fields.Float()
    no_speech_prob = fields.Float()


class Word(Schema):
    """A word, with the punctuation beside it; times in seconds from the beginning."""

    word = fields.String(required=True)
    start = fields.Float(required=True)
    end = fields.Float(required=True)


class WhisperResult(Schema):
    """What was said."""

    text = fields.String(required=True)
    language = fields.String(required=True)
    duration = fields.Float(required=True)
    segments = fields.List(fields.Nested(Segment), required=True)
    words = fields.List(fields.Nested(Word), metadata={"description": "Only where the job asks for word_timestamps."})
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


def with_defaults(job_type: JobType, params: Mapping[str, Any]) -> dict[str, Any]:
    """Params that were validated before, by a release that may have known fewer of them."""
    known = PARAMS[job_type].fields.items()
    lacking = {name: field.load_default for name, field in known if name not in params}
    return {
        **{name: value() if callable(value) else value for name, value in lacking.items() if value is not missing},
        **params,
    }


def load_params(job_type: JobType, params: Mapping[str, Any]) -> dict[str, Any]:
    """Validated params with every default filled in. Raises marshmallow's ValidationError by field."""
    loaded: dict[str, Any] = PARAMS[job_type].load(params)
    return loaded
