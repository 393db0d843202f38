"""Pictures, sounds and texts that clients send wrongly: refused with field and rule before a job is made of them."""

import base64
import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from engines.media import BadMedia, check_picture, sound_kind
from engines.schemas import RESULTS, load_params

JOBS = "/api/v1/jobs"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def draw(**params: Any) -> dict[str, Any]:
    return {"type": "image_gen", "params": {"prompt": "a cat", **params}}


def look(**params: Any) -> dict[str, Any]:
    return {"type": "vision", "params": {"image_base64": b64(picture()), "question": "what?", **params}}


def listen(**params: Any) -> dict[str, Any]:
    return {"type": "whisper", "params": {"audio_base64": b64(b"RIFF\0\0\0\0WAVEfmt "), **params}}


def embed(texts: Any, **params: Any) -> dict[str, Any]:
    return {"type": "embedding", "params": {"input": texts, **params}}


def chat(text: str) -> dict[str, Any]:
    return {"type": "llm", "params": {"messages": [{"role": "user", "content": text}] * 2}}


INVALID = {
    "a picture that is no Base64": (look(image_base64="%%%%"), "params.image_base64", "Base64"),
    "a picture with line breaks": (look(image_base64=b64(picture())[:20] + "\n"), "params.image_base64", "Base64"),
    "a picture of 0 bytes": (look(image_base64=""), "params.image_base64", "empty"),
    "text as a picture": (look(image_base64=b64(b"hello")), "params.image_base64", "PNG"),
    "a sound as a picture": (look(image_base64=b64(b"RIFF\0\0\0\0WAVEfmt ")), "params.image_base64", "PNG"),
    "a script as a picture": (look(image_base64=b64(b"%!PS-Adobe-3.0 EPSF")), "params.image_base64", "PNG"),
    "the first bytes of a picture": (look(image_base64=b64(picture()[:12])), "params.image_base64", "PNG"),
    "an image bomb": (look(image_base64=b64(bomb())), "params.image_base64", "pixels"),
    "a picture of 21 MiB": (look(image_base64="A" * (28 * 2**20)), "params.image_base64", "Too large"),
    "an unknown vision task": (look(task="image_qs"), "params.task", "image_qa, image_caption, ocr"),
    "no question for image_qa": (look(question=None), "params.question", "image_qa"),
    "a sound of 0 bytes": (listen(audio_base64=""), "params.audio_base64", "empty"),
    "text as a sound": (listen(audio_base64=b64("你好".encode())), "params.audio_base64", "WAV"),
    "a picture as a sound": (listen(audio_base64=b64(picture())), "params.audio_base64", "WAV"),
    "a language that does not exist": (listen(language="xx"), "params.language", "zh"),
    "an unknown whisper task": (listen(task="summarise"), "params.task", "transcribe"),
    "width 7": (draw(width=7), "params.width", "64"),
    "width 8": (draw(width=8), "params.width", "64"),
    "width 100000": (draw(width=100_000), "params.width", "4096"),
    "width 100": (draw(width=100), "params.width", "multiple of 8"),
    "height 65": (draw(height=65), "params.height", "multiple of 8"),
    "steps 0": (draw(steps=0), "params.steps", "1"),
    "steps 1000": (draw(steps=1000), "params.steps", "150"),
    "no prompt": (draw(prompt=""), "params.prompt", "1"),
    "a prompt past the limit": (draw(prompt="x" * 8001), "params.prompt", "8000"),
    "a negative seed": (draw(seed=-1), "params.seed", "0"),
    "guidance of 31": (draw(guidance_scale=31), "params.guidance_scale", "30"),
    "a hundred texts of 100,000 characters": (embed(["x" * 100_000] * 100), "params.input", "65536"),
    "2 million characters in all": (embed(["x" * 65_000] * 31), "params.input", "2000000"),
    "a conversation of 1.2 million characters": (chat("x" * 600_000), "params.messages", "1000000"),
    "no texts": (embed([]), "params.input", "At least 1"),
    "an empty text": (embed(["a", ""]), "params.input", "1 to"),
    "texts that are numbers": (embed([1, 2]), "params.input", "strings"),
    "3000 texts": (embed(["a"] * 3000), "params.input", "2048"),
    "an unknown input type": (embed("a", input_type="document"), "params.input_type", "query, passage"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_cannot_be_run_is_refused_with_the_field_and_the_rule(client, name):
    body, field, rule = INVALID[name]

    answer = client.post(JOBS, json=body)

    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert rule in answer.json["errors"][field][0]
    assert len(answer.data) < 1500
    assert client.get(JOBS).json["items"] == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_of_every_kind_are_accepted(kind):
    check_picture(picture(kind))


def test_a_data_url_is_accepted_and_kept_as_bare_base64(client):
    text = b64(picture())

    answer = client.post(JOBS, json=look(image_base64=f"data:image/png;base64,{text}"))

    assert answer.status_code == 202
    params = {"image_base64": f"data:image/png;base64,{text}", "question": "what?"}
    assert load_params("vision", params)["image_base64"] == text


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "wav"),
        (b"fLaC\x00\x00\x00\x22", "flac"),
        (b"OggS\x00\x02", "ogg"),
        (b"ID3\x04\x00", "mp3"),
        (b"\xff\xfb\x90\x64", "mp3"),
        (b"\xff\xf1\x50\x80", "aac"),
        (b"\x00\x00\x00\x20ftypM4A ", "mp4"),
        (b"\x1a\x45\xdf\xa3\x01", "webm"),
    ],
)
def test_sounds_are_known_by_their_first_bytes(head, kind):
    assert sound_kind(head) == kind


@pytest.mark.parametrize("data", [b"", b"\xff", b"RIFF\0\0\0\0AVI ", b"\xff\xd8\xff\xe0", b"MZ\x90\x00"])
def test_what_is_no_sound_is_refused(data):
    with pytest.raises(BadMedia):
        sound_kind(data)


def test_every_result_schema_knows_warnings():
    assert all("warnings" in schema.fields for schema in RESULTS.values())
