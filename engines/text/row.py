"""One request inside an engine that generates text, from its submission to its end."""

from collections.abc import Collection

from engines.contract import Progress, Report, Text
from engines.request import Request
from engines.text.answer import Answer
from engines.text.grammar import Grammar
from engines.text.logprobs import Logprobs
from engines.text.sampling import Sampler
from engines.text.thinking import Spoken


class Row(Request):
    """One request: its tokens, its text, and how it ended."""

    advice = "Shorten the messages or max_tokens."

    def __init__(
        self,
        prompt: Collection[int],
        max_tokens: int,
        sampler: Sampler,
        answer: Answer | Spoken,
        end_tokens: Collection[int],
        report: Report,
        *,
        grammar: Grammar | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """grammar: what the answer is kept to. logprobs: told with each text, if they are asked for."""
        super().__init__(report)
        #: Prompt and answer so far.
        self.ids = list(prompt)
        #: How many of ids have been through the model and lie in its cache.
        self.cached = 0
        #: Grows with every row that begins to be computed; the highest number is the youngest row.
        self.joined = 0
        self.sampler = sampler
        self.answer = answer
        self.grammar = grammar
        self.logprobs = logprobs
        self.prompt_tokens = len(self.ids)
        self.max_tokens = max_tokens
        #: "stop" or "length", once the answer is complete.
        self.finish_reason: str | None = None
        self._end_tokens = end_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, the one that ended the answer included."""
        return len(self.ids) - self.prompt_tokens

    @property
    def size(self) -> str:
        """Prompt and answer so far."""
        return f"A text of {len(self.ids)} tokens"

    def accept(self, token: int) -> None:
        """Add a generated token, tell about it, and end the row if it was the last."""
        self.take(token)
        self.poll()
        if self.finish_reason:
            self.ended.set()

    def take(self, token: int) -> None:
        """Add a generated token and tell its text; sets finish_reason if it was the last."""
        self.ids.append(token)
        if token in self._end_tokens:
            self.finish_reason = "stop"
            if self.logprobs:
                self.logprobs.drop()
        elif self.grammar:
            self.grammar.take(token)
        piece = self._read(token)
        shown = self.logprobs.show() if self.logprobs and (piece or self.finish_reason) else ()
        if piece or shown:
            self.tell(Text(piece, logprobs=shown))

    def poll(self) -> None:
        """Tell how far it is, and so let report() stop it."""
        self.tell(Progress(self.completion_tokens, self.max_tokens, "token"))

    def _read(self, token: int) -> str:
        """The new text that a token gives; sets finish_reason where the text or the length ends the answer."""
        piece = "" if self.finish_reason else self.answer.add(token)
        if self.answer.stopped or (self.grammar and self.grammar.complete):
            self.finish_reason = "stop"
        elif not self.finish_reason and self.completion_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return piece + self.answer.close() if self.finish_reason else piece
