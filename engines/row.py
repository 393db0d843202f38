"""One request inside the LLM engine, from its submission to its end."""

import logging
import threading
from collections.abc import Collection

from engines.answer import Answer
from engines.contract import JobInterrupted, Progress, Report, Text
from engines.sampling import Sampler

logger = logging.getLogger(__name__)


class Row:
    """One request: its tokens, its text, and how it ended.

    Made by a job thread, which then waits for `ended`; everything else is done by the engine thread. No method raises:
    what report() raises ends this row and no other.
    """

    def __init__(
        self,
        prompt: Collection[int],
        max_tokens: int,
        sampler: Sampler,
        answer: Answer,
        end_tokens: Collection[int],
        report: Report,
    ) -> None:
        #: Prompt and answer so far.
        self.ids = list(prompt)
        #: How many of ids have been through the model and lie in its cache.
        self.cached = 0
        #: Grows with every row that begins to be computed; the highest number is the youngest row.
        self.joined = 0
        self.sampler = sampler
        self.answer = answer
        self.prompt_tokens = len(self.ids)
        self.max_tokens = max_tokens
        #: "stop" or "length", once the answer is complete.
        self.finish_reason: str | None = None
        #: Why there is no answer, if there is none.
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._end_tokens = end_tokens
        self._report = report

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, the one that ended the answer included."""
        return len(self.ids) - self.prompt_tokens

    def accept(self, token: int) -> None:
        """Add a generated token, tell about it, and end the row if it was the last."""
        self.ids.append(token)
        if token in self._end_tokens:
            self.finish_reason = "stop"
        try:
            self._tell(self._read(token))
        except JobInterrupted as interruption:
            self.end(interruption)
        except Exception as error:
            logger.exception("a row failed while its token was reported")
            self.end(error)
        else:
            if self.finish_reason:
                self.ended.set()

    def poll(self) -> None:
        """Let report() stop a row that gets no token for now."""
        try:
            self._tell("")
        except JobInterrupted as interruption:
            self.end(interruption)
        except Exception as error:
            logger.exception("a waiting row failed while its progress was reported")
            self.end(error)

    def end(self, error: Exception) -> None:
        """End without an answer; the first end counts."""
        if not self.ended.is_set():
            # Its frames hold tensors of the engine thread, which would live as long as the job's traceback.
            self.error = error.with_traceback(None)
            self.ended.set()

    def _read(self, token: int) -> str:
        """The new text that a token gives; sets finish_reason where the text or the length ends the answer."""
        piece = "" if self.finish_reason else self.answer.add(token)
        if self.answer.stopped:
            self.finish_reason = "stop"
        elif not self.finish_reason and self.completion_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return piece + self.answer.close() if self.finish_reason else piece

    def _tell(self, piece: str) -> None:
        if piece:
            self._report(Text(piece))
        self._report(Progress(self.completion_tokens, self.max_tokens, "token"))
