import io
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from engines.contract import InvalidInput, JobCancelled
from engines.media import sound_kind
from engines.whisper import sound

FFMPEG = shutil.which("ffmpeg")


def tone(rate: int, seconds: float = 2.0, pitch: float = 440.0) -> NDArray[np.float32]:
    """A sine at half of the full scale."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encode(samples: NDArray[np.float32], rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def loudness(samples: NDArray[np.float32], pitch: float) -> float:
    """Amplitude of one pitch in a sound of 16 kHz, its first and last quarter of a second aside."""
    middle = samples[4000:-4000].astype(np.float64)
    return float(2 * abs(np.mean(middle * np.exp(-2j * np.pi * pitch * np.arange(middle.size) / sound.RATE))))


@pytest.mark.parametrize(
    ("form", "subtype", "rate", "channels"),
    [
        ("WAV", "PCM_U8", 8000, 1),
        ("WAV", "PCM_16", 16000, 1),
        ("WAV", "PCM_24", 44100, 2),
        ("WAV", "FLOAT", 96000, 6),
        ("RF64", "PCM_16", 44100, 1),
        ("FLAC", "PCM_16", 44100, 2),
        ("OGG", "VORBIS", 22050, 1),
        ("OGG", "OPUS", 48000, 2),
        ("MP3", None, 44100, 2),
    ],
)
def test_every_kind_rate_and_number_of_channels_becomes_mono_at_16_khz(
    form: str, subtype: str | None, rate: int, channels: int
) -> None:
    data = encode(np.tile(tone(rate)[:, None], channels), rate, form, subtype)

    heard = sound.decode(data)

    assert sound_kind(data) == {"RF64": "wav"}.get(form, form.lower())
    assert (heard.samples.dtype, heard.samples.ndim) == (np.float32, 1)
    assert heard.duration == pytest.approx(2.0, abs=0.03)  # MP3 comes in frames
    assert heard.samples.size == pytest.approx(16000 * heard.duration, abs=2)
    assert loudness(heard.samples, 440) == pytest.approx(0.5, abs=0.02)


def test_channels_are_averaged() -> None:
    samples = tone(16000)

    heard = sound.decode(encode(np.stack([samples, -samples], axis=1), 16000))

    assert np.abs(heard.samples).max() < 1e-4


def test_what_16_khz_cannot_hold_is_filtered_and_not_folded_back() -> None:
    heard = sound.decode(encode(tone(44100, pitch=10_000), 44100))

    assert np.abs(heard.samples[4000:-4000]).max() < 1e-3


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(np.random.default_rng(0).uniform(-0.9, 0.9, 44100).astype(np.float32), 44100, subtype="FLOAT")
    whole = sound.decode(data)

    monkeypatch.setattr(sound, "BLOCK", 1000)

    assert np.allclose(sound.decode(data).samples, whole.samples, atol=1e-6)


def test_float_samples_that_are_no_sound_are_tamed() -> None:
    samples = np.array([np.nan, np.inf, -np.inf, 1e30, -3.0, 0.25] * 100, np.float32)

    heard = sound.decode(encode(samples, 16000, subtype="FLOAT"))

    assert heard.samples[:6].tolist() == [0.0, 1.0, -1.0, 1.0, -1.0, 0.25]


def test_a_wav_whose_writer_could_not_go_back_to_its_header_is_read() -> None:
    data = bytearray(encode(tone(16000), 16000))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"

    assert sound.decode(bytes(data)).duration == 2.0


# --- what is refused

HUGE = encode(np.zeros((16, sound.MOST_CHANNELS + 1), np.float32), 16000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Not a sound file"),
        (b"The quick brown fox, written down already.", "Not a sound file"),
        (encode(tone(16000), 16000)[:20_000], "cut off"),
        (encode(tone(16000), 16000, "FLAC")[:20_000], "cannot be decoded"),
        (encode(tone(16000), 16000, "OGG", "VORBIS")[:-40], "cut off"),
        (encode(tone(44100), 44100, "MP3")[:6000], "cut off"),
        (encode(tone(16000, 0), 16000), "no sound"),
        (b"RIFF\x20\x00\x00\x00WAVEfmt " + bytes(24), "cannot be decoded"),
        (b"\xff\xfb" + b"Not MPEG at all. " * 50, "cannot be decoded"),
        (HUGE, "33 channels"),
    ],
)
def test_what_is_broken_or_empty_is_refused_with_the_reason(
    data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no second opinion from ffmpeg

    with pytest.raises(InvalidInput, match=f"audio_base64: .*{reason}") as refused:
        sound.decode(data)

    assert refused.value.code == "invalid_audio"


def test_hours_of_silence_in_a_small_file_are_refused_before_they_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sound, "MOST_HOURS", 1 / 3600)
    honest = encode(np.zeros(160_000, np.float32), 16000, "FLAC")
    silent_about_it = bytearray(honest)
    silent_about_it[21] &= 0xF0
    silent_about_it[22:26] = bytes(4)  # total samples in STREAMINFO: 0 means unknown

    for data in (honest, bytes(silent_about_it)):
        with pytest.raises(InvalidInput, match="longer than") as refused:
            sound.decode(data)
        assert refused.value.code == "audio_too_long"


def test_a_job_that_is_cancelled_while_its_sound_is_decoded_stops_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "BLOCK", 16_000)
    looks = 0

    def poll() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        sound.decode(encode(tone(16000, 60), 16000), poll)

    assert looks == 3


# --- ffmpeg

M4A = b"\x00\x00\x00\x20ftypM4A " + bytes(64)


@pytest.mark.parametrize("data", [M4A, b"\xff\xf1" + bytes(64), b"\x1a\x45\xdf\xa3" + bytes(64)])
def test_without_ffmpeg_its_kinds_are_refused_with_what_to_install(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")

    with pytest.raises(InvalidInput, match="apt-get install ffmpeg") as refused:
        sound.decode(data)

    assert refused.value.code == "ffmpeg_missing"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called ffmpeg that the test writes."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "ffmpeg"
    program.touch(0o755)
    return program


def test_ffmpeg_gets_the_file_where_it_can_seek_and_is_told_its_kind(stand_in: Path) -> None:
    # Writes as sound what it was given as a file, from behind the head of 32 bytes on.
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != -f ]; do shift; done\n[ "$2" = mov ] || exit 1\ntail -c +33 "$4"\n')
    samples = tone(16000)

    heard = sound.decode(M4A[:32] + samples.tobytes())

    assert np.array_equal(heard.samples, samples)
    assert heard.duration == 2.0


def test_what_ffmpeg_says_about_a_broken_file_is_passed_on(stand_in: Path) -> None:
    stand_in.write_text('#!/bin/sh\necho "[mov @ 0x55] moov atom not found" >&2\nexit 1\n')

    with pytest.raises(InvalidInput, match="ffmpeg cannot decode it: moov atom not found") as refused:
        sound.decode(M4A)

    assert refused.value.code == "invalid_audio"


def test_a_cancelled_job_ends_an_ffmpeg_that_hangs(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")

    def cancel() -> None:
        if (tmp_path / "pid").exists():
            raise JobCancelled

    start = time.monotonic()
    with pytest.raises(JobCancelled):
        sound.decode(M4A, cancel)

    assert time.monotonic() - start < 10
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(
    ("name", "codec", "cut_is_seen"),
    [("a.m4a", "aac", True), ("a.aac", "aac", False), ("a.webm", "libopus", True), ("a.wav", "adpcm_g722", True)],
)
def test_ffmpeg_reads_what_libsndfile_does_not(name: str, codec: str, cut_is_seen: bool, tmp_path: Path) -> None:
    (tmp_path / "in.wav").write_bytes(encode(tone(44100), 44100))
    command = [str(FFMPEG), "-v", "error", "-i", str(tmp_path / "in.wav"), "-c:a", codec, str(tmp_path / name)]
    subprocess.run(command, check=True)
    data = (tmp_path / name).read_bytes()

    heard = sound.decode(data)

    assert heard.duration == pytest.approx(2.0, abs=0.1)
    assert loudness(heard.samples, 440) == pytest.approx(0.5, abs=0.03)
    if cut_is_seen:
        with pytest.raises(InvalidInput, match="audio_base64"):
            sound.decode(data[: len(data) // 2])
