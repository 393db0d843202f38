"""One row at a time through transformers' own generate(): for models whose cache is more than keys and values."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from engines.text.drawing import Draw
from engines.text.row import Row


class Alone:
    """The same as Batched, slower: a turn answers one row from beginning to end. Used by the engine thread alone."""

    def __init__(self, network: Any, penalty: float, between_steps: Callable[[], bool]) -> None:
        """network: a transformers causal language model.

        penalty: the model's repetition penalty, 1 for none.
        between_steps: looks after the rows that wait meanwhile;
        false when the engine is to end.
        """
        self.rows: list[Row] = []
        #: The row that is being computed right now: if generate() raises, this one has failed.
        self.stepping: Sequence[Row] = ()
        self._network = network
        self._penalty = penalty
        self._between_steps = between_steps

    def turn(self, waiting: deque[Row]) -> None:
        """Answer the first waiting row."""
        row = waiting.popleft()
        self.rows = [row]
        self.stepping = self.rows
        self._network.generate(
            input_ids=torch.tensor([row.ids], device=self._network.device),
            attention_mask=torch.ones(1, len(row.ids), dtype=torch.long, device=self._network.device),
            max_new_tokens=row.max_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([Draw(self.rows, self._penalty)]),
            stopping_criteria=StoppingCriteriaList([_Accept(row, self._between_steps)]),
        )
        self.reap()

    def make_room(self) -> Sequence[Row]:
        """There is only one row at a time."""
        return []

    def reap(self) -> None:
        """Take out the row if it has ended."""
        self.rows = [row for row in self.rows if not row.ended.is_set()]


class _Accept(StoppingCriteria):  # type: ignore[misc]
    """Gives the row its token, and stops when the row has ended or the engine is to end."""

    def __init__(self, row: Row, between_steps: Callable[[], bool]) -> None:
        self._row = row
        self._between_steps = between_steps

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self._row.ended.is_set():
            self._row.accept(int(input_ids[0, -1]))
        done = not self._between_steps() or self._row.ended.is_set()
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)
