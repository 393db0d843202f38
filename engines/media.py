"""Pictures and sounds as they arrive: what kind a file is by its first bytes, and how large a picture claims to be.

Nothing here decodes: the API looks, and only engines open. Both share the limits.
"""

import base64
import binascii
import io

from PIL import Image

#: Kinds of picture that are opened; Pillow knows dozens more, with as many decoders to attack.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
#: Most pixels of a picture. Decoded to RGB they take three times as many bytes.
MOST_PIXELS = 50_000_000
MOST_PICTURE_BYTES = 20 * 2**20
#: An hour of speech as MP3 at 64 kbit/s takes 27 MiB.
MOST_SOUND_BYTES = 36 * 2**20


class BadMedia(ValueError):
    """A file that is not what it should be; the message says why, for its sender."""


def decode(text: str, most_bytes: int) -> bytes:
    """The bytes of Base64 text, with or without a data URL's head. Raises BadMedia."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadMedia("Not a Base64 data URL.")
    if len(text) * 3 // 4 > most_bytes + 2:
        raise BadMedia(f"Too large: at most {most_bytes} bytes.")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadMedia(f"Not valid Base64: {error}.") from error
    if not data:
        raise BadMedia("An empty file.")
    return data


def check_picture(data: bytes) -> None:
    """Pass if the file begins like a picture of a known kind and claims no more pixels than may be opened.

    Raises BadMedia.
    """
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as error:
        raise BadMedia(f"Too many pixels: at most {MOST_PIXELS}.") from error
    except Exception as error:  # Pillow's plugins raise whatever a broken header makes them raise
        raise BadMedia("Not a picture: PNG, JPEG, WebP, GIF, BMP and TIFF are read.") from error
    if width * height > MOST_PIXELS:
        raise BadMedia(f"Too many pixels: {width} x {height}; at most {MOST_PIXELS}.")


def sound_kind(data: bytes) -> str:
    """What a sound file is by its first bytes: "wav", "flac", "ogg", "mp3", "mp4", "aac" or "webm". Raises BadMedia."""
    head = data[:16]
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "ogg"
    if head[4:8] == b"ftyp":
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if head[:3] == b"ID3":
        return "mp3"
    # A frame's sync word is eleven set bits; of the two layer bits, MPEG audio never has 00 and ADTS always has.
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "mp3" if head[1] & 0x06 else "aac"
    raise BadMedia("Not a sound file: WAV, MP3, FLAC, Ogg, M4A, AAC and WebM are read.")
