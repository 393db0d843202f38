"""What was said in one clip, written down window by window as openai-whisper's transcribe() does it.

transcribe() is one call for the whole clip. Taken apart into its windows it lets other jobs in between two of them,
computes windows of several clips together, and says how far it is. It also encodes a window once and not again at
each temperature, and computes an hour's spectrogram in blocks (transcribe() needs 1.5 GB for it). Its thresholds and
defaults are kept; the tests hold both together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from whisper.audio import HOP_LENGTH, N_FFT, N_FRAMES, SAMPLE_RATE, mel_filters, pad_or_trim
from whisper.decoding import DecodingResult
from whisper.tokenizer import Tokenizer

from engines.whisper.sound import Samples

#: Tried one after another until the text is neither repetitive nor improbable.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: Text that gzip shrinks by more than this is repetitive.
MOST_COMPRESSION = 2.4
#: Mean log probability of a token under which a text is improbable.
LEAST_LOGPROB = -1.0
#: Probability of "no speech" above which an improbable text is taken for silence.
NO_SPEECH = 0.6
#: What was sampled at a higher temperature is not shown to the next window.
MOST_PROMPT_TEMPERATURE = 0.5

#: Seconds of one spectrogram frame, and spectrogram frames of one step of a timestamp (20 ms).
FRAME_S = HOP_LENGTH / SAMPLE_RATE
FRAMES_PER_TIMESTAMP = 2
#: Frames of a spectrogram that are computed at once: five minutes.
BLOCK_FRAMES = 30_000


class Transcript:
    """One clip: where the next window begins, and what the windows so far said.

    Source of the rules: openai/whisper 20250625, whisper/transcribe.py.
    """

    def __init__(
        self, spectrogram: torch.Tensor, frames: int, tokenizer: Tokenizer, said_before: str | None = None
    ) -> None:
        """spectrogram: float32, shape (mels, at least `frames`), of which the first `frames` are the clip's.

        said_before: what the first window is told, as text.
        """
        self.segments: list[dict[str, Any]] = []
        self._spectrogram = spectrogram
        self._frames = frames
        self._tokenizer = tokenizer
        self._seek = 0
        self._tokens: list[int] = tokenizer.encode(f" {said_before.strip()}") if said_before else []
        self._text_from = len(self._tokens)
        self._prompt_from = 0

    @property
    def finished(self) -> bool:
        """Nothing is left to hear."""
        return self._seek >= self._frames

    @property
    def seconds(self) -> int:
        """How far it has come, in whole seconds of the clip."""
        return int(min(self._seek, self._frames) * FRAME_S)

    @property
    def prompt(self) -> list[int]:
        """Tokens that the next window is told were said before it."""
        return self._tokens[self._prompt_from :]

    @property
    def text(self) -> str:
        """What was said."""
        return str(self._tokenizer.decode(self._tokens[self._text_from :])).strip()

    def window(self) -> torch.Tensor:
        """The spectrogram of the next window, float32, shape (mels, 3000): 30 s."""
        window: torch.Tensor = pad_or_trim(self._spectrogram[:, self._seek : self._seek + self.frames_left], N_FRAMES)
        return window

    def take(self, result: DecodingResult) -> None:
        """Write down what the next window said, and go on behind it."""
        if result.no_speech_prob > NO_SPEECH and result.avg_logprob <= LEAST_LOGPROB:
            self._seek += self.frames_left
            return
        tokens = result.tokens
        heard = {
            "seek": self._seek,
            "temperature": float(result.temperature),
            "avg_logprob": float(result.avg_logprob),
            "compression_ratio": float(result.compression_ratio),
            "no_speech_prob": float(result.no_speech_prob),
        }
        is_time = [token >= self._tokenizer.timestamp_begin for token in tokens]
        #: Behind each pair of timestamps, the end of one segment and the begin of the next.
        cuts = [at + 1 for at in range(len(tokens) - 1) if is_time[at] and is_time[at + 1]]
        ends_with_one = is_time[-2:] == [False, True]
        if cuts:
            if ends_with_one:
                cuts.append(len(tokens))
            for begin, end in zip([0, *cuts], cuts, strict=False):
                said = tokens[begin:end]
                self._add(heard, self._time(said[0]), self._time(said[-1]), said)
            # What follows the last pair was not heard to its end, so the next window begins there.
            self._seek += self.frames_left if ends_with_one else FRAMES_PER_TIMESTAMP * self._time(tokens[cuts[-1] - 1])
        else:
            times = [self._time(token) for token, time in zip(tokens, is_time, strict=True) if time]
            length = times[-1] if times and times[-1] else self.frames_left / FRAMES_PER_TIMESTAMP
            self._add(heard, 0, length, tokens)
            self._seek += self.frames_left
        if result.temperature > MOST_PROMPT_TEMPERATURE:
            self._prompt_from = len(self._tokens)

    @property
    def frames_left(self) -> int:
        """Frames of the next window that are the clip's."""
        size: int = min(N_FRAMES, self._frames - self._seek)
        return size

    def _time(self, token: int) -> int:
        """Steps from the window's begin to a timestamp."""
        return token - int(self._tokenizer.timestamp_begin)

    def _add(self, heard: Mapping[str, Any], begin: int, end: float, tokens: Sequence[int]) -> None:
        """heard: what its window says of all its segments. begin, end: timestamp steps from the window's begin.

        A segment without length or text counts for nothing.
        """
        text = self._tokenizer.decode([token for token in tokens if token < self._tokenizer.eot]).strip()
        if begin == end or not text:
            return
        self._tokens += tokens
        begin_s, end_s = (
            # Timestamps may lie behind the clip's end: a window is always 30 s.
            round(min(heard["seek"] + steps * FRAMES_PER_TIMESTAMP, self._frames) * FRAME_S, 2)
            for steps in (begin, end)
        )
        self.segments.append(
            {"id": len(self.segments), "start": begin_s, "end": end_s, "text": text, **heard, "tokens": list(tokens)}
        )


def needs_another(result: DecodingResult) -> bool:
    """Whether a window is to be decoded again at a higher temperature: improbable but for silence, or repetitive."""
    improbable, silent = result.avg_logprob < LEAST_LOGPROB, result.no_speech_prob > NO_SPEECH
    repetitive = result.compression_ratio > MOST_COMPRESSION
    return bool((improbable or repetitive) and not (improbable and silent))


def spectrogram(samples: Samples, mels: int, between_blocks: Callable[[], None]) -> tuple[torch.Tensor, int]:
    """The log-Mel spectrogram of a clip, and how many of its frames are the clip's.

    samples: float32, shape (n,), 16 kHz. Returns float32, shape (mels, frames), of at least 30 s: silence is behind a
    shorter clip. In blocks of five minutes, since the transform takes ten times the memory of what it gives.
    Source: openai/whisper, whisper/audio.py, log_mel_spectrogram.
    """
    frames = len(samples) // HOP_LENGTH
    count = max(frames, N_FRAMES)
    half = N_FFT // 2
    # Frame i is centred on sample 160 * i; the first ones see the clip's begin mirrored.
    sound = torch.zeros(half + max(len(samples), count * HOP_LENGTH + half))
    sound[half : half + len(samples)] = torch.from_numpy(samples)
    sound[:half] = sound[half + 1 : N_FFT + 1].flip(0)
    filters, hann = mel_filters("cpu", mels), torch.hann_window(N_FFT)
    log = torch.empty(mels, count)
    for begin in range(0, count, BLOCK_FRAMES):
        between_blocks()
        end = min(begin + BLOCK_FRAMES, count)
        block = sound[begin * HOP_LENGTH : (end - 1) * HOP_LENGTH + N_FFT]
        power = torch.stft(block, N_FFT, HOP_LENGTH, window=hann, center=False, return_complex=True).abs() ** 2
        log[:, begin:end] = torch.clamp(filters @ power, min=1e-10).log10()
    log.clamp_(min=float(log.max()) - 8.0)
    return log.add_(4.0).div_(4.0), frames
