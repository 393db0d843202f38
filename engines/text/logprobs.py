"""The log probabilities of an answer's tokens, told with the text that the tokens became."""

from collections.abc import Sequence
from typing import Any

import torch

from engines.text.answer import Answer
from engines.text.vocabulary import Vocabulary

#: JSON has no -Infinity; OpenAI writes this.
LEAST = -9999.0


class Logprobs:
    """Those of one answer, as LlmResult has them. Used by the engine thread alone."""

    def __init__(self, vocabulary: Vocabulary, answer: Answer, top: int) -> None:
        """answer: what the tokens become. top: how many of the most probable tokens are told beside each.

        Raises InvalidInput where the tokenizer does not say what its tokens are.
        """
        #: Of the tokens whose text was shown.
        self.shown: list[dict[str, Any]] = []
        self.top = top
        self._vocabulary = vocabulary
        self._answer = answer
        self._hidden: list[dict[str, Any]] = []
        vocabulary.trie  # noqa: B018 - refuse now and not at the first token

    def add(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        """One more token of the answer, and the most probable ones in its place."""
        tops = [self._entry(*pair) for pair in top[: self.top]]
        self._hidden.append({**self._entry(token, logprob), "top_logprobs": tops})

    def drop(self) -> None:
        """The last token ended the answer, and is none of its text."""
        self._hidden.pop()

    def show(self) -> list[dict[str, Any]]:
        """Those of the text that was shown since the last call."""
        behind, end = len(self._answer.unshown.encode()), len(self._hidden)
        while end and behind and len(self._hidden[end - 1]["bytes"]) <= behind:
            end -= 1
            behind -= len(self._hidden[end]["bytes"])
        shown, self._hidden = self._hidden[:end], self._hidden[end:]
        self.shown += shown
        return shown

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._vocabulary.spell(token)
        return {
            "token": spelled.decode(errors="replace"),
            "logprob": max(logprob, LEAST),
            "bytes": list(spelled),
        }


def tell(wanted: Sequence[Logprobs], scores: torch.Tensor, tokens: Sequence[int]) -> None:
    """Add to each its next token.

    scores: log probabilities, float32, shape (answers, vocabulary).
    """
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    most = min(max(logprobs.top for logprobs in wanted), scores.shape[1])
    values, places = (part.tolist() for part in scores.topk(most, dim=-1))
    for logprobs, token, logprob, top, where in zip(wanted, tokens, chosen, values, places, strict=True):
        logprobs.add(token, logprob, list(zip(where, top, strict=True)))
