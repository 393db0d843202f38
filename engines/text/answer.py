"""The text of one answer while its tokens arrive: whole characters only, cut at the first stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Answer:
    """Turns tokens into text that can be shown at once and is never taken back."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, keep_special: bool = False) -> None:
        """tokenizer: a tokenizers.Tokenizer, the Rust object behind a fast tokenizer.

        keep_special: special tokens are text like others; else they are left out.
        """
        #: What the answer is so far; without the stop string, once that was found.
        self.text = ""
        #: A stop string was found: nothing more is added.
        self.stopped = False
        self._cut = ""
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[int] = []
        self._skip_special = not keep_special
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that one more token lets us show: none while a character or a possible stop string is incomplete."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token)
        if not piece:
            return ""
        self._extend(piece)
        return self._show(len(self.text) - self._held())

    def close(self) -> str:
        """The text that was still held back, now that no token follows."""
        if not self.stopped:
            # The stream keeps bytes to itself that never became a character; decoding all at once shows them as U+FFFD.
            whole = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip_special)
            if whole.startswith(self.text):
                self._extend(whole[len(self.text) :])
        return self._show(len(self.text))

    @property
    def unshown(self) -> str:
        """What the tokens say behind the text that was shown: held back for now, or cut off with a stop string."""
        return self.text[self._shown :] + self._cut

    def _extend(self, piece: str) -> None:
        longest = max(map(len, self._stops), default=1)
        start = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self._cut = self.text[: min(found)], self.text[min(found) :]
            self.stopped = True

    def _held(self) -> int:
        """How many characters at the end may turn out to begin a stop string."""
        if self.stopped:
            return 0
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
