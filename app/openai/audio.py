"""POST /v1/audio/transcriptions and /translations: a whisper job, from a form with a file."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, jsonify
from flask_smorest.fields import Upload
from marshmallow import Schema, fields, validate

from app.auth import requires
from app.keys import Scope
from app.openai.calls import Call, CallHeaders, Done, job_ids, params_for, run
from app.openai.fields import Asked, Ignored, Unsupported
from app.openai.routes import TEXT, blueprint, states_server_errors
from app.parsing import refusal
from engines import media
from engines.catalogue import JobType

#: Fields of the form by the params that they become.
NAMES = {"audio_base64": "file", "word_timestamps": "timestamp_granularities[]"}
SEGMENT_MEMBERS = (
    *("id", "seek", "start", "end", "text", "tokens", "temperature"),
    *("avg_logprob", "compression_ratio", "no_speech_prob"),
)


class TranslationCreate(Asked):
    """The form of a translation into English."""

    file = Upload(required=True, metadata={"description": "WAV, MP3, FLAC, Ogg, M4A, AAC or WebM."})
    prompt = fields.String(metadata={"description": "What was said before, or how to spell names."})
    response_format = fields.String(
        load_default="json", validate=validate.OneOf(["json", "text", "srt", "vtt", "verbose_json"])
    )
    temperature = fields.Float(allow_nan=False, metadata={"description": "0 to 1."})


class TranscriptionCreate(TranslationCreate):
    """The form of a transcription."""

    language = fields.String(metadata={"description": "Its ISO 639 code; left out, it is detected.", "example": "zh"})
    timestamp_granularities = fields.List(
        fields.String(validate=validate.OneOf(["segment", "word"])),
        data_key="timestamp_granularities[]",
        load_default=list,
        metadata={"description": "Only with verbose_json."},
    )
    stream = Unsupported("false", "False", "0", why="The answer comes as a whole.")
    include = fields.List(Unsupported(), data_key="include[]")
    chunking_strategy = Ignored()


class SegmentView(Schema):
    """A stretch of speech; seconds from the beginning."""

    id = fields.Integer()
    start = fields.Float()
    end = fields.Float()
    text = fields.String()


class TranscriptionView(Schema):
    """What was said: `json` has the text and the usage, `verbose_json` all."""

    text = fields.String(required=True)
    task = fields.String()
    language = fields.String()
    duration = fields.Float()
    segments = fields.List(fields.Nested(SegmentView))
    words = fields.List(fields.Raw())
    usage = fields.Raw(metadata={"type": "object", "example": {"type": "duration", "seconds": 12}})


@blueprint.post("/audio/transcriptions")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(TranscriptionCreate(), location="multipart")
@blueprint.response(200, TranscriptionView)
@blueprint.alt_response(200, schema=TEXT, content_type="text/plain", success=True)
@blueprint.alt_response(200, schema=TEXT, content_type="text/vtt", success=True)
@states_server_errors
def create_transcription(call: Call, asked: dict[str, Any]) -> Any:
    """Write speech down in its own language."""
    if asked["timestamp_granularities"] and asked["response_format"] != "verbose_json":
        raise refusal({NAMES["word_timestamps"]: ["Only with response_format verbose_json."]})
    return _heard(call, asked, "transcribe")


@blueprint.post("/audio/translations")
@requires(Scope.INFER)
@blueprint.arguments(CallHeaders(), location="headers")
@blueprint.arguments(TranslationCreate(), location="multipart")
@blueprint.response(200, TranscriptionView)
@blueprint.alt_response(200, schema=TEXT, content_type="text/plain", success=True)
@blueprint.alt_response(200, schema=TEXT, content_type="text/vtt", success=True)
@states_server_errors
def create_translation(call: Call, asked: dict[str, Any]) -> Any:
    """Write speech down in English."""
    return _heard(call, asked, "translate")


def _heard(call: Call, asked: Mapping[str, Any], task: str) -> Response:
    data = asked["file"].read(media.MOST_SOUND_BYTES + 1)
    params = {
        "audio_base64": base64.b64encode(data).decode(),
        "task": task,
        "language": asked.get("language"),
        # A form sends what is left empty too.
        "prompt": asked.get("prompt") or None,
        "temperature": asked.get("temperature"),
        "word_timestamps": "word" in asked.get("timestamp_granularities", ()) or None,
    }
    if not data:
        raise refusal({"file": ["An empty file."]})
    done = run(call, [call.asks(JobType.WHISPER, asked["model"], params_for(JobType.WHISPER, params, NAMES))])
    response = FORMATS[asked["response_format"]](done[0])
    response.headers.update(job_ids(done))
    return response


def srt(segments: list[Mapping[str, Any]]) -> str:
    """Segments as SubRip has them."""
    blocks = (
        f"{number}\n{clock(segment['start'], ',')} --> {clock(segment['end'], ',')}\n{segment['text'].strip()}\n"
        for number, segment in enumerate(segments, 1)
    )
    return "\n".join(blocks)


def vtt(segments: list[Mapping[str, Any]]) -> str:
    """Segments as WebVTT has them."""
    blocks = (
        f"{clock(segment['start'], '.')} --> {clock(segment['end'], '.')}\n"
        # An arrow within a text would begin another cue.
        f"{segment['text'].strip().replace('-->', '->')}\n"
        for segment in segments
    )
    return "\n".join(["WEBVTT\n", *blocks])


def clock(seconds: float, point: str) -> str:
    """Seconds as 00:01:02.500."""
    total = round(seconds * 1000)
    return f"{total // 3_600_000:02}:{total // 60_000 % 60:02}:{total // 1000 % 60:02}{point}{total % 1000:03}"


def _usage(done: Done) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(done.result["duration"])}


def _json(done: Done) -> Response:
    return jsonify({"text": done.result["text"], "usage": _usage(done)})


def _verbose(done: Done) -> Response:
    result = done.result
    segments = [{name: one[name] for name in SEGMENT_MEMBERS if name in one} for one in result["segments"]]
    told = {name: result[name] for name in ("task", "language", "duration", "text")} | {"segments": segments}
    return jsonify(told | {name: result[name] for name in ("words",) if name in result} | {"usage": _usage(done)})


FORMATS: Mapping[str, Callable[[Done], Response]] = {
    "json": _json,
    "verbose_json": _verbose,
    "text": lambda done: Response(f"{done.result['text']}\n", content_type="text/plain; charset=utf-8"),
    "srt": lambda done: Response(srt(done.result["segments"]), content_type="text/plain; charset=utf-8"),
    "vtt": lambda done: Response(vtt(done.result["segments"]), content_type="text/vtt; charset=utf-8"),
}
