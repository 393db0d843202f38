"""A vision model's network, and how it answers several questions about pictures in one pass."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from engines.grouped import Step
from engines.text.drawing import Draw
from engines.vision.processors import collate
from engines.vision.question import Question

#: Most tokens of a pass, padding included, per token that means something.
MOST_PADDING = 1.5

#: Sampling settings that generate() would warn about where it is greedy, and lengths that it would mix with ours.
_UNSET = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length")


class Viewer:
    """Answers by transformers' generate(), whose rows begin together and end one by one.

    Used by the engine thread alone.
    """

    unit = "token"

    def __init__(self, network: Any, end_tokens: Sequence[int], pad_token: int) -> None:
        """network: an image-text-to-text model of transformers; its generation config is made greedy, since the rows
        draw their own tokens.
        """
        #: Questions of one pass, at most.
        self.together = 1
        #: Tokens that the questions and answers of one pass may have, at most.
        self.budget_tokens = 0
        self._network = network
        self._pad_token = pad_token
        settings = network.generation_config
        for name in _UNSET:
            setattr(settings, name, None)
        settings.do_sample, settings.num_beams = False, 1
        settings.eos_token_id, settings.pad_token_id = list(end_tokens), pad_token

    def key(self, request: Question) -> Hashable:
        """Any two questions can share a pass."""
        return None

    def pick(self, alike: Sequence[Question]) -> Sequence[Question]:
        """The oldest question and those nearest to it in length, as long as little is padded."""
        first, *others = alike
        batch = [first]
        for other in sorted(others, key=lambda question: abs(len(question.ids) - len(first.ids))):
            if len(batch) < self.together and self._fits([*batch, other]):
                batch.append(other)
        return [question for question in alike if question in batch]

    def compute(self, batch: Sequence[Question], step: Step) -> None:
        """Generate the answers, each from where it is."""
        self._generate(
            batch,
            max(question.left for question in batch),
            LogitsProcessorList([Draw(batch, penalty=1.0)]),
            StoppingCriteriaList([_Accept(batch, step)]),
        )

    def logits(self, questions: Sequence[Question], tokens: Sequence[int]) -> torch.Tensor:
        """What one pass computes while every answer is made to be those tokens, to compare passes by.

        float32, shape (questions, tokens, vocabulary).
        """
        follow = _Follow(tokens)
        self._generate(questions, len(tokens), LogitsProcessorList([follow]), StoppingCriteriaList())
        return torch.stack(follow.seen, dim=1)

    def _generate(self, batch: Sequence[Question], tokens: int, logits: Any, stopping: Any) -> None:
        inputs = collate(
            [question.inputs for question in batch], [question.generated for question in batch], self._pad_token
        )
        self._network.generate(
            **{name: self._place(tensor) for name, tensor in inputs.items()},
            max_new_tokens=tokens,
            logits_processor=logits,
            stopping_criteria=stopping,
        )

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self._network.dtype if tensor.is_floating_point() else None
        return tensor.to(self._network.device, dtype)

    def _fits(self, batch: Sequence[Question]) -> bool:
        longest = max(len(question.ids) for question in batch)
        end = longest + max(question.left for question in batch)
        return (
            longest * len(batch) <= MOST_PADDING * sum(len(question.ids) for question in batch)
            and end * len(batch) <= self.budget_tokens
        )


class _Accept(StoppingCriteria):  # type: ignore[misc]
    """Gives each question its token, and says which have ended. Raises Abandoned when nobody wants the pass."""

    def __init__(self, batch: Sequence[Question], step: Step) -> None:
        self._batch = batch
        self._step = step
        self._steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for question, token in zip(self._batch, input_ids[:, -1].tolist(), strict=True):
            if not question.ended.is_set():
                question.take(token)
        self._steps += 1
        self._step(self._steps, None)
        for question in self._batch:
            if question.finish_reason:
                question.ended.set()
        ended = [question.ended.is_set() for question in self._batch]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class _Follow(LogitsProcessor):  # type: ignore[misc]
    """Keeps the logits, and makes every answer the same."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.seen: list[torch.Tensor] = []
        self._tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._tokens[len(self.seen)]] = 0
        self.seen.append(scores.float())
        return only
