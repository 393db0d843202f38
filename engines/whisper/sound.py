"""Sound files into what Whisper hears: mono, 16 kHz, decoded in memory and in blocks.

WAV, FLAC, Ogg and MP3 are read by libsndfile, which soundfile's wheel carries. M4A, AAC and WebM, and what libsndfile
refuses of its own kinds (a WAV of an exotic codec), are read by the ffmpeg program where there is one.
"""

import contextlib
import io
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from engines.contract import InvalidInput
from engines.media import BadMedia, sound_kind

#: Samples per second of everything that is decoded here.
RATE = 16_000
#: A FLAC of silence packs a day into a megabyte. An hour takes 230 MB here.
MOST_HOURS = 4
MOST_CHANNELS = 32
MOST_RATE = 384_000
#: Values (samples x channels) that are decoded between two looks at the job.
BLOCK = 2**20
#: Seconds that a file may lack of what its header promises: MP3 encoders count their padding in different ways.
SLACK_S = 0.1
#: RIFF sizes from here on mean "not known": the writer could not go back, as in `ffmpeg -f wav -`.
UNKNOWN_SIZE = 0x7FFF_0000

#: What ffmpeg calls our kinds. Told the kind, it cannot be talked into reading a playlist, which names other files.
DEMUXERS = {"wav": "wav", "flac": "flac", "ogg": "ogg", "mp3": "mp3", "mp4": "mov", "aac": "aac", "webm": "matroska"}

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sound:
    """A decoded file."""

    #: float32, shape (n,), 16 kHz, in [-1, 1].
    samples: Samples
    #: Of the file, in seconds.
    duration: float


class Straight(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read from begin to end."""

    def seekable(self) -> bool:
        """False: asked, soundfile seeks behind every block, which fails in a FLAC that does not say how long it is."""
        return False


def decode(data: bytes, poll: Callable[[], None] = lambda: None) -> Sound:
    """The sound of a file.

    poll: called every few seconds of sound and at least four times a second while waiting for ffmpeg; what it raises
    ends the decoding. Raises InvalidInput: invalid_audio, audio_too_long or ffmpeg_missing.
    """
    try:
        kind = sound_kind(data)
    except BadMedia as error:
        raise InvalidInput(f"audio_base64: {error}", code="invalid_audio") from error
    if kind not in ("wav", "flac", "ogg", "mp3"):
        return _gather(_by_ffmpeg(data, kind, poll), poll)
    if _is_cut_off(data, kind):
        raise _truncated()
    try:
        file = Straight(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        if shutil.which("ffmpeg"):
            return _gather(_by_ffmpeg(data, kind, poll), poll)
        raise _damaged(error) from error
    with file:
        try:
            return _gather(_by_libsndfile(file), poll)
        except soundfile.LibsndfileError as error:
            raise _damaged(error) from error


def _gather(blocks: Iterator[tuple[Samples, float]], poll: Callable[[], None]) -> Sound:
    """blocks: mono at 16 kHz, each with the file's seconds so far."""
    samples, seconds = np.empty(0, np.float32), 0.0
    # Closed at once, not when it is collected: it may hold a running ffmpeg.
    with contextlib.closing(blocks):  # type: ignore[type-var]
        for block, seconds in blocks:
            poll()
            if seconds > MOST_HOURS * 3600:
                raise _too_long()
            heard = samples.size
            # Grows in place (mremap): a list of blocks would need the memory twice when it is joined.
            samples.resize(heard + block.size, refcheck=False)
            # Float formats may hold anything. NaN would spread over the whole spectrogram; 16 bits clip as well.
            samples[heard:] = np.clip(np.nan_to_num(block, nan=0.0, posinf=1.0, neginf=-1.0), -1, 1)
    if not samples.size:
        raise _invalid("it has no sound in it")
    return Sound(samples, seconds)


def _by_libsndfile(file: soundfile.SoundFile) -> Iterator[tuple[Samples, float]]:
    rate, channels, promised = file.samplerate, file.channels, file.frames
    if channels > MOST_CHANNELS or not 1 <= rate <= MOST_RATE:
        raise _invalid(f"{channels} channels at {rate} Hz; at most {MOST_CHANNELS} at {MOST_RATE} Hz are read")
    # A stream's header promises nothing, which libsndfile gives as the largest number that there is.
    known = promised < 2**62
    if known and promised > MOST_HOURS * 3600 * rate:
        raise _too_long()
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32")
    frames = 0
    while True:
        block = file.read(BLOCK // channels, dtype="float32", always_2d=True)
        frames += len(block)
        last = len(block) == 0
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))
        if rate != RATE:
            mono = resampler.resample_chunk(mono, last=last)
        yield mono, frames / rate
        if last:
            break
    if known and frames + SLACK_S * rate < promised:
        raise _truncated()


def _by_ffmpeg(data: bytes, kind: str, poll: Callable[[], None]) -> Iterator[tuple[Samples, float]]:
    program = shutil.which("ffmpeg")
    if program is None:
        raise InvalidInput(
            f"audio_base64: this is {kind.upper()}, which this worker reads by the ffmpeg program, and that is not "
            "installed (apt-get install ffmpeg). WAV, FLAC, Ogg and MP3 are read without it.",
            code="ffmpeg_missing",
        )
    with _memory_file(data) as file, tempfile.TemporaryFile() as said:
        command = [program, "-nostdin", "-v", "error", "-threads", "1", "-protocol_whitelist", "file,pipe"]
        command += ["-f", DEMUXERS[kind], "-i", f"/dev/fd/{file.fileno()}", "-map", "0:a:0"]
        # One second more than is allowed, so that too much can be told from just enough.
        command += ["-t", str(MOST_HOURS * 3600 + 1), "-ac", "1", "-ar", str(RATE), "-f", "f32le", "pipe:1"]
        process = subprocess.Popen(  # noqa: S603 - no part of the command comes from the file
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, pass_fds=[file.fileno()]
        )
        assert process.stdout is not None
        try:
            yield from _read(process.stdout, poll)
            # Its verdict; killed in between it would have none.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        said.seek(0)
        # "[in#0 @ 0x55c0ff0d1300] moov atom not found", then what follows from it.
        complaint = said.readline(300).decode(errors="replace").rpartition("] ")[2].strip()
        # It ends well whatever it missed; a container that is cut off is told from its words alone.
        if any(word in complaint for word in ("partial file", "truncated", "ended prematurely")):
            raise _truncated()
        if process.returncode > 0:
            raise _invalid(f"ffmpeg cannot decode it: {complaint}")


def _read(pipe: IO[bytes], poll: Callable[[], None]) -> Iterator[tuple[Samples, float]]:
    rest, count = b"", 0
    while True:
        while not select.select([pipe], [], [], 0.25)[0]:
            poll()
        chunk = os.read(pipe.fileno(), BLOCK)
        if not chunk:
            return
        chunk = rest + chunk
        whole = len(chunk) // 4 * 4
        rest = chunk[whole:]
        count += whole // 4
        yield np.frombuffer(chunk[:whole], "<f4"), count / RATE


def _memory_file(data: bytes) -> IO[bytes]:
    """A file that ffmpeg can seek in, as M4A with its index at the end needs; in memory where the system can."""
    # Only Linux has it.
    memory = getattr(os, "memfd_create", None)
    file: IO[bytes] = os.fdopen(memory("sound"), "w+b") if memory else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


def _is_cut_off(data: bytes, kind: str) -> bool:
    """Whether a file ends before its container says so; libsndfile reads what there is and says nothing."""
    if kind == "wav":
        size = int.from_bytes(data[4:8], "little")
        return len(data) < size + 8 and size < UNKNOWN_SIZE
    if kind == "ogg":
        # RFC 3533: a page's byte 5 holds 4 on the last one; its body is as long as the table behind byte 26 sums up to.
        page = data[data.rfind(b"OggS") :]
        whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
        return not (whole and page[5] & 4)
    return False


def _invalid(reason: str) -> InvalidInput:
    return InvalidInput(f"audio_base64: {reason}.", code="invalid_audio")


def _damaged(error: soundfile.LibsndfileError) -> InvalidInput:
    return _invalid(f"it cannot be decoded ({error.error_string.strip().rstrip('.')})")


def _truncated() -> InvalidInput:
    return _invalid("the file is cut off: it holds less than its header promises")


def _too_long() -> InvalidInput:
    return InvalidInput(f"audio_base64: longer than {MOST_HOURS} hours; split it.", code="audio_too_long")
