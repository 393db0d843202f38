"""The answer of a model that thinks first: what it says between its marks is streamed, its thoughts are not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.text.answer import Answer

THOUGHT = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
#: Around the gist of an answer, inside its text.
BOX = ("<|begin_of_box|>", "<|end_of_box|>")
MARKS = (*THOUGHT, *ANSWER, *BOX)

_BOX = re.compile("|".join(map(re.escape, BOX)))


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a model's output is its answer."""

    answer: str
    #: It ends inside a thought: the answer has not begun.
    thinking: bool = False


def read(said: str, *, complete: bool = True, opened: bool = False) -> Reading:
    """The answer in an output of the form <think>...</think><answer>...</answer>, of which every part may be missing.

    Marks count at the beginning only, so that an answer may speak of them; box marks are left out anywhere. Text
    without marks is the answer as it is.

    complete: nothing follows. If something may, text is held back that could turn out to be part of a mark: what is
    returned is then always the beginning of what a later call returns.
    opened: the prompt ended with <think>, as some chat templates make it.
    """
    said, thought = (said, True) if opened else _after(said, THOUGHT[0])
    if thought:
        _, mark, said = said.partition(THOUGHT[1])
        if not mark:
            return Reading("", thinking=True)
    said, marked = _after(said, ANSWER[0])
    if marked:
        said, ended, _ = said.partition(ANSWER[1])
        complete = complete or bool(ended)
    if not complete and _begins(said, () if thought and marked else MARKS):
        return Reading("")
    if not complete:
        said = said[: len(said) - _held(said, (*BOX, *(ANSWER[1:] if marked else ())))]
    said = _BOX.sub("", said)
    return Reading(said.strip() if thought or marked else said)


def _after(said: str, mark: str) -> tuple[str, bool]:
    """What follows a mark at the beginning, white space aside; all of it, and false, if there is none."""
    begun = said.lstrip()
    return (begun[len(mark) :], True) if begun.startswith(mark) else (said, False)


def _begins(said: str, marks: Sequence[str]) -> bool:
    begun = said.lstrip()
    return any(mark.startswith(begun) for mark in marks)


def _held(said: str, marks: Sequence[str]) -> int:
    """How many characters at the end may turn out to begin a mark."""
    return max((n for mark in marks for n in range(1, len(mark)) if said.endswith(mark[:n])), default=0)


class Spoken:
    """Turns tokens into the text of the answer alone; to be used like an Answer."""

    #: No stop strings are looked for.
    stopped = False

    def __init__(self, tokenizer: Any, opened: bool) -> None:
        """tokenizer: a tokenizers.Tokenizer. opened: the prompt ended with <think>."""
        #: What the answer is so far.
        self.text = ""
        #: The output so far ends inside a thought.
        self.thinking = opened
        self._opened = opened
        # Marks may be special tokens, which decoding leaves out unless it keeps them all.
        self._said = Answer(tokenizer, (), keep_special=True)
        added = tokenizer.get_added_tokens_decoder().items()
        self._hidden = {token for token, kind in added if kind.special and kind.content not in MARKS}

    def add(self, token: int) -> str:
        """The text that one more token lets us show."""
        if token in self._hidden:
            return ""
        self._said.add(token)
        return self._show(complete=False)

    def close(self) -> str:
        """The text that was still held back, now that no token follows."""
        self._said.close()
        return self._show(complete=True)

    def _show(self, complete: bool) -> str:
        reading = read(self._said.text, complete=complete, opened=self._opened)
        piece = reading.answer[len(self.text) :]
        self.text, self.thinking = reading.answer, reading.thinking
        return piece
