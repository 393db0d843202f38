"""When each word of a window was said: openai-whisper's alignment of its text with the decoder's attention."""

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from whisper import Whisper
from whisper.audio import N_FRAMES, pad_or_trim
from whisper.timing import add_word_timestamps, dtw_cpu
from whisper.tokenizer import Tokenizer

_compiling = threading.Lock()


def prepare() -> None:
    """Let numba compile the alignment, which takes ten seconds once: by a job's thread, so that no other job waits."""
    with _compiling:
        _compile()


@cache
def _compile() -> None:
    dtw_cpu(np.zeros((2, 2)))


def words_of(
    segments: Sequence[dict[str, Any]],
    network: Whisper,
    tokenizer: Tokenizer,
    window: torch.Tensor,
    frames: int,
    last_end_s: float,
) -> list[dict[str, Any]]:
    """The words of one window's segments, with times in seconds from the clip's begin.

    window: its spectrogram, shape (mels, 3000), on the network's device and in its dtype. frames: how many of them are
    the clip's. last_end_s: where the last word before it ended.
    """
    # Copies: the alignment also moves the segments' own times, which stay what the model wrote.
    aligned = [{key: part[key] for key in ("seek", "start", "end", "tokens")} for part in segments]
    add_word_timestamps(
        segments=aligned,
        model=network,
        tokenizer=tokenizer,
        mel=pad_or_trim(window, N_FRAMES),
        num_frames=frames,
        last_speech_timestamp=last_end_s,
    )
    return [
        {"word": word["word"].strip(), "start": round(float(word["start"]), 2), "end": round(float(word["end"]), 2)}
        for part in aligned
        for word in part["words"]
        if word["word"].strip()
    ]
