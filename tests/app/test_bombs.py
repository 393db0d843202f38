"""Small files that claim to be huge: what they cost a process that is sent them."""

import subprocess
import sys

import pytest

from tests.rig import ROOT

#: What one bomb may add to a process's memory, with room for what it decodes of its own text.
MOST_GROWTH_MIB = 40

FILES = """
import base64, io, resource, struct, sys, zlib

def png(width, height, data):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

def rows(width, height):
    # Made in pieces: the bomb's maker must not be what grows.
    packer, row, packed = zlib.compressobj(1), bytes(1 + (width + 7) // 8), b""
    for _ in range(height):
        packed += packer.compress(row)
    return packed + packer.flush()

def tiff(entries):
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4 + 64)

def text_chunk():
    # A picture of one pixel, and a comment of 200 MB.
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    body = b"Comment\\0\\0" + packed
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = png(8, 8, rows(8, 8))
    return whole[:33] + chunk + whole[33:]

WIDE = [(256, 4, 1, 13_000), (257, 4, 1, 13_000), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1)]
LYING = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
PICTURES = {
    "a PNG of 13,000 x 13,000": png(13_000, 13_000, rows(13_000, 13_000)),
    "a PNG with a comment of 200 MB": text_chunk(),
    "a GIF that claims 65,535 x 65,535": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0xF7, 0, 0) + bytes(768)
    + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\\x08\\x02\\x4c\\x01\\x00;",
    "a TIFF that claims 13,000 x 13,000": tiff([*WIDE, (273, 4, 1, 100), (278, 4, 1, 13_000), (279, 4, 1, 4)]),
    "a TIFF whose strips lie beyond it": tiff([*LYING, (273, 4, 2**31 - 1, 8), (279, 4, 2**31 - 1, 8)]),
    "a TIFF whose strip has 4 GB": tiff([*LYING, (273, 4, 1, 100), (278, 4, 1, 64), (279, 4, 1, 2**32 - 1)]),
}

def wav(riff, fmt, data, channels=1, rate=16_000, bits=16):
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block % 2**16, bits)
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<I", fmt) + head + b"data" \\
        + struct.pack("<I", data) + bytes(range(256)) * 40

SOUNDS = {
    "a WAV of 4 GB": wav(2**32 - 1, 16, 2**32 - 2),
    "a WAV whose head has 4 GB": wav(2**32 - 1, 2**32 - 1, 2**32 - 1),
    "a WAV of 65,535 channels": wav(20_000, 16, 10_240, channels=65_535),
    "a WAV at 4 GHz": wav(20_000, 16, 10_240, rate=2**32 - 1),
}

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
"""

API = """
import tempfile
from app import create_app
from app.settings import Settings
from app.tables import upgrade
from tasks.settings import load_regions

folder = tempfile.mkdtemp()
url = f"sqlite:///{folder}/jobs.db"
upgrade(url)
away = {"GPU_STORE_URL": "redis://127.0.0.1:1/1", "GPU_BROKER_URL": "redis://127.0.0.1:1/0"}
client = create_app(Settings(url, f"{folder}/blobs", load_regions(away), "asia-east", threads=8)).test_client()

def send(data, **params):
    kind, field = ("whisper", "audio_base64") if "audio" in params else ("vision", "image_base64")
    body = {field: base64.b64encode(data).decode()} | ({"question": "what?"} if kind == "vision" else {})
    return client.post("/api/v1/jobs", json={"type": kind, "params": body}).status_code

small = png(8, 8, rows(8, 8))
assert (send(small), send(wav(10_276, 16, 10_240), audio=True)) == (202, 202)
for name, data in PICTURES.items():
    before = peak_mib()
    print(f"{name}|{send(data)}|{peak_mib() - before:.0f}")
for name, data in SOUNDS.items():
    before = peak_mib()
    print(f"{name}|{send(data, audio=True)}|{peak_mib() - before:.0f}")
"""

ENGINES = """
from engines.contract import InvalidInput
from engines.vision import picture
from engines.whisper import sound

def opened(read, data):
    try:
        read(data)
    except InvalidInput:
        return "refused"
    return "read"

assert opened(picture.read, png(8, 8, rows(8, 8))) == opened(sound.decode, wav(10_276, 16, 10_240)) == "read"
for read, files in ((picture.read, PICTURES), (sound.decode, SOUNDS)):
    for name, data in files.items():
        before = peak_mib()
        print(f"{name}|{opened(read, data)}|{peak_mib() - before:.0f}")
"""

#: So that a bomb that goes off takes no more than this process.
LIMITS = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)\n"


@pytest.mark.parametrize("who", ["the API", "an engine"])
def test_a_small_file_that_claims_to_be_huge_costs_little_memory(who):
    code = LIMITS + FILES + (API if who == "the API" else ENGINES)

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = {
        name: (outcome, int(mib)) for name, outcome, mib in (row.split("|") for row in done.stdout.split("\n") if row)
    }
    assert len(outcomes) == 10
    assert {name: mib for name, (_, mib) in outcomes.items() if mib > MOST_GROWTH_MIB} == {}
    bomb, _ = outcomes["a PNG of 13,000 x 13,000"]
    assert bomb in ("422", "refused")
    assert {outcome for outcome, _ in outcomes.values()} <= {"422", "202", "refused", "read"}
