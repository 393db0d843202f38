"""Files, JSON, path strings and credentials that somebody may send and that must be refused; each with its name."""

import base64
import io
import json
import struct
import time
import wave
import zlib
from collections.abc import Mapping

import jwt
from PIL import Image

PNG, RIFF = b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\x7fWAVE"


def _chunk(kind: bytes, data: bytes, *, claimed: int | None = None) -> bytes:
    length = len(data) if claimed is None else claimed
    return struct.pack(">I", length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _picture(kind: str, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    # Noise: a plain one is so short that half of it says it all.
    Image.effect_noise(size, 90).convert("RGB").save(file, kind)
    return file.getvalue()


def _cut(kind: str, share: float) -> bytes:
    data = _picture(kind)
    return data[: int(len(data) * share)]


def _wave(seconds: float = 0.1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(bytes(int(32_000 * seconds)))
    return file.getvalue()


def _form(channels: int, rate: int, bits: int, kind: int = 1) -> bytes:
    return b"fmt " + struct.pack("<IHHIIHH", 16, kind, channels, rate, 0, min(channels * bits // 8, 65_535), bits)


PICTURES: Mapping[str, bytes] = {
    "png signature alone": PNG,
    "png without ihdr": PNG + _chunk(b"IDAT", b""),
    "png of 0 x 0": _png(0, 0),
    "png of 0 x 1": _png(0, 1),
    "png of 2^31-1 x 1": _png(2**31 - 1, 1),
    "png of 2^32-1 x 2^32-1": _png(2**32 - 1, 2**32 - 1),
    "png bomb 13000 x 13000": _png(13_000, 13_000, rows=bytes(10_000)),
    "png bomb 1 x 60000000": _png(1, 60_000_000),
    "png without pixels": _png(64, 64),
    "png with half its pixels": _png(64, 64, rows=bytes(64 * 97)),
    "png of an unknown colour": _png(8, 8, colour=9, rows=bytes(200)),
    "png of 3 bits": _png(8, 8, depth=3, rows=bytes(200)),
    "png with a chunk of 4 GiB": PNG + _chunk(b"IHDR", bytes(13), claimed=2**32 - 1),
    "png with a broken checksum": PNG + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))[:-4] + bytes(4),
    "png with a stream that is none": PNG
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    + _chunk(b"IDAT", b"x" * 99)
    + _chunk(b"IEND", b""),
    "png cut in the header": _cut("PNG", 0.01),
    "png cut in half": _cut("PNG", 0.5),
    "jpeg cut in the header": _cut("JPEG", 0.02),
    "jpeg cut in half": _cut("JPEG", 0.5),
    "jpeg start alone": b"\xff\xd8\xff",
    "jpeg start and end": b"\xff\xd8\xff\xd9",
    "jpeg of 65535 x 65535": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03"
    + b"\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9",
    "jpeg marker without length": b"\xff\xd8\xff\xe0",
    "jpeg marker of length 0": b"\xff\xd8\xff\xe0\x00\x00" + bytes(40),
    "webp head alone": b"RIFF\x1a\x00\x00\x00WEBPVP8 ",
    "webp cut in half": _cut("WEBP", 0.5),
    "webp of a wrong kind": b"RIFF\x1a\x00\x00\x00WEBPVP9Z" + bytes(20),
    "gif head alone": b"GIF89a",
    "gif of 65535 x 65535": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    "gif cut in half": _cut("GIF", 0.5),
    "bmp head alone": b"BM" + bytes(12),
    "bmp of 2^31-1 pixels": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 1, 1, 24, 0, 0, 0, 0, 0, 0),
    "bmp cut in half": _cut("BMP", 0.5),
    "tiff head alone": b"II*\x00\x08\x00\x00\x00",
    "tiff whose directory is itself": b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
    "tiff with a directory beyond its end": b"MM\x00*\xff\xff\xff\xff",
    "svg with an entity": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    "html": b"<html><script>alert(1)</script></html>",
    "zip": b"PK\x03\x04" + bytes(60),
    "pdf that says png": b"%PDF-1.4\n" + PNG,
}

SOUNDS: Mapping[str, bytes] = {
    "wav head alone": RIFF,
    "wav without data": RIFF + _form(1, 16_000, 16),
    "wav of 0 channels": RIFF + _form(0, 16_000, 16) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav of 65535 channels": RIFF + _form(65_535, 16_000, 16) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav of 0 Hz": RIFF + _form(1, 0, 16) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav of 4 GHz": RIFF + _form(1, 2**32 - 1, 16) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav of 0 bits": RIFF + _form(1, 16_000, 0) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav of an unknown codec": RIFF + _form(1, 16_000, 16, kind=0x7777) + b"data\x10\x00\x00\x00" + bytes(16),
    "wav cut in the header": _wave()[:30],
    "wav cut in half": _wave()[:1600],
    "wav with a chunk of 4 GiB": RIFF + b"LIST\xfe\xff\xff\xff" + bytes(8),
    "wav that is an avi": b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(20),
    "flac head alone": b"fLaC",
    "flac without frames": b"fLaC\x80\x00\x00\x22" + bytes(34),
    "flac of 0 Hz": b"fLaC\x80\x00\x00\x22\x10\x00\x10\x00" + bytes(30),
    "flac with a block of 16 MiB": b"fLaC\x00\xff\xff\xff" + bytes(64),
    "ogg head alone": b"OggS",
    "ogg of zeros": b"OggS" + bytes(60),
    "ogg with a broken checksum": b"OggS\x00\x02" + bytes(20) + b"\x01\x1e\x01vorbis" + bytes(40),
    "mp3 tag alone": b"ID3\x04\x00\x00\x00\x00\x00\x00",
    "mp3 tag of 256 MiB": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(40),
    "mp3 sync alone": b"\xff\xfb",
    "mp3 of an unknown bit rate": b"\xff\xfb\xf0\x64" + bytes(60),
    "aiff": b"FORM\x00\x00\x00\x20AIFFCOMM" + bytes(20),
    "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a concat list": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "midi": b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x00\x60",
    "a picture": _png(8, 8, rows=bytes(200)),
    "an elf program": b"\x7fELF\x02\x01\x01" + bytes(40),
    "text": "一二三".encode(),
}

_DEEP = b"[" * 20_000 + b"]" * 20_000
_DIGITS = b"9" * 10**6
_CHAT = b'{"type":"llm","params":{"messages":[{"role":"user","content":"hi"}]%s}}'
_SAYS = b'{"type":"llm","params":{"messages":[{"role":"user","content":"%s"}]}}'


def _chat(more: bytes) -> bytes:
    return _CHAT.replace(b"%s", b"," + more)


#: Bodies of POST /jobs, all of which are JSON in the eyes of some reader.
JSONS: Mapping[str, bytes] = {
    "deep in an unknown field": b'{"type":"llm","x":' + _DEEP + b"}",
    "deep in a message": b'{"type":"llm","params":{"messages":' + _DEEP + b"}}",
    "deep in a tensor": b'{"type":"triton","params":{"model_name":"m","inputs":[{"data":' + _DEEP + b"}]}}",
    "deep in a workflow": b'{"type":"comfyui","params":{"workflow":{"1":{"class_type":"x","inputs":{"x":'
    + b'{"x":' * 20_000
    + b"1"
    + b"}" * 20_000
    + b"}}}}}",
    "deep and never closed": b'{"type":' + b'{"a":[' * 50_000,
    "10^6 digits in priority": b'{"type":"llm","priority":' + _DIGITS + b"}",
    "10^6 digits in a seed": _chat(b'"seed":' + _DIGITS),
    "10^6 digits after the point": _chat(b'"temperature":3.' + _DIGITS),
    "10^6 digits in an exponent": _chat(b'"temperature":1e' + _DIGITS),
    "minus 10^6 digits": _chat(b'"max_tokens":-' + _DIGITS),
    "4300 digits": _chat(b'"max_tokens":' + b"9" * 4300),
    "NaN in a param": _chat(b'"temperature":NaN'),
    "Infinity in a param": _chat(b'"top_p":Infinity'),
    "minus Infinity in a message": b'{"type":"llm","params":{"messages":[{"role":"user","content":-Infinity}]}}',
    "a number beyond floats": _chat(b'"temperature":1e999'),
    "two types": b'{"type":"vision",' + _CHAT.replace(b"%s", b"")[1:],
    "two params": b'{"params":{},' + _CHAT.replace(b"%s", b"")[1:],
    "two temperatures": _chat(b'"temperature":0.1,"temperature":0.2'),
    "two roles, one escaped": _SAYS.replace(b'"content"', b'"r\\u006fle":"system","content"'),
    "a high surrogate alone": b'{"type":"llm","params":{"messages":[{"role":"user","content":"\\ud800"}]}}',
    "a low surrogate alone": b'{"type":"llm","params":{"messages":[{"role":"user","content":"\\udfff"}]}}',
    "surrogates the wrong way round": _SAYS.replace(b"%s", b"\\udc00\\ud800"),
    "a surrogate in a stop string": _chat(b'"stop":["\\ud83d"]'),
    "a surrogate in the model": b'{"model":"\\ud800",' + _CHAT.replace(b"%s", b"")[1:],
    "a surrogate in the region": b'{"region":"\\ud800",' + _CHAT.replace(b"%s", b"")[1:],
    "a surrogate as UTF-8": b'{"type":"llm","params":{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}}',
    "an overlong slash": b'{"type":"llm","params":{"messages":[{"role":"user","content":"\xc0\xaf"}]}}',
    "a comment": b'{"type":"llm",/**/"params":{}}',
    "a comma too many": b'{"type":"llm","params":{},}',
    "single quotes": b"{'type':'llm'}",
}

#: What stands where an id or a name is due, as it is put into the URL.
PATHS: Mapping[str, str] = {
    "dot dot": "%2e%2e",
    "up to a file": "..%2f..%2f..%2fetc%2fpasswd",
    "twice encoded": "%252e%252e%252f",
    "backslashes": "..%5c..%5cwindows",
    "a NUL": "%00",
    "a NUL at the end": "x%00.json",
    "a line break": "x%0d%0aSet-Cookie:a=b",
    "no UTF-8": "%ff%fe",
    "an overlong slash": "%c0%af",
    "a surrogate": "%ed%a0%80",
    "a cut escape": "%",
    "no escape": "%zz",
    "a quote": "'%20OR%20'1'='1",
    "a statement": "1;DROP%20TABLE%20jobs--",
    "markup": "%3Cscript%3Ealert(1)%3C%2Fscript%3E",
    "a template": "%7B%7B7*7%7D%7D",
    "a shell": "$(id)",
    "a glob": "*",
    "a tilde": "~root",
    "null": "null",
    "minus one": "-1",
    "a number beyond 64 bits": "99999999999999999999999",
    "a right-to-left mark": "%e2%80%ae",
    "a uuid with braces": "%7B00000000-0000-4000-8000-000000000000%7D",
    "ten thousand characters": "x" * 10_000,
}


def keys(real: str) -> dict[str, dict[str, str]]:
    """Headers that are not quite those of the key."""
    last = "A" if real[-1] != "A" else "B"
    return {
        "nothing": {"X-API-Key": ""},
        "a space": {"X-API-Key": " "},
        "another last character": {"X-API-Key": real[:-1] + last},
        "one character less": {"X-API-Key": real[:-1]},
        "one character more": {"X-API-Key": real + "A"},
        "in capitals": {"X-API-Key": real.upper()},
        "its first part": {"X-API-Key": real[:12]},
        "another's secret": {"X-API-Key": real[:13] + "A" * 43},
        "as basic": {"Authorization": "Basic " + base64.b64encode(f"key:{real}".encode()).decode()},
        "bearer of nothing": {"Authorization": "Bearer "},
        "no scheme": {"Authorization": real},
        "a JSON Web Token without signature": {"Authorization": "Bearer " + jwt.encode({"sub": "x"}, "", "none")},
        "of a hundred thousand characters": {"X-API-Key": "gpi_" + "x" * 100_000},
    }


def tokens(secret: str, worker_id: str, address: str) -> dict[str, str]:
    """Tokens that let nobody in, although most say what a good one says."""
    now = int(time.time())
    claims = {
        "jti": "00000000-0000-4000-8000-000000000000",
        "aud": worker_id,
        "sub": "owner",
        "type": "llm",
        "addr": address,
        "iat": now,
        "exp": now + 60,
    }
    head, body, signature = jwt.encode(claims, secret, "HS256").split(".")
    richer = base64.urlsafe_b64encode(json.dumps({**claims, "sub": "admin"}).encode()).decode().rstrip("=")
    return {
        "no algorithm": jwt.encode(claims, None, "none"),
        "another algorithm": jwt.encode(claims, secret, "HS512"),
        "no signature": f"{head}.{body}.",
        "another owner": f"{head}.{richer}.{signature}",
        "a list of workers without this one": jwt.encode({**claims, "aud": ["a", "b"]}, secret, "HS256"),
        "no end": jwt.encode({name: value for name, value in claims.items() if name != "exp"}, secret, "HS256"),
        "an unknown type": jwt.encode({**claims, "type": "root"}, secret, "HS256"),
    }
