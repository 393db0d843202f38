"""One step of every row: from the model's logits to the next token, by all that a row asks for."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from engines.contract import EngineError, InvalidInput
from engines.text.logprobs import tell
from engines.text.row import Row
from engines.text.sampling import choose, penalise


def draw(rows: Sequence[Row], logits: torch.Tensor, penalty: float) -> list[int | None]:
    """The next token of each row; a row that gets None has ended.

    logits: the model's own, float32, shape (rows, vocabulary); changed in place. penalty: for tokens that a row has
    seen, 1 for none.
    """
    asking = [at for at, row in enumerate(rows) if row.logprobs]
    # Before anything is changed: what the model thinks, not what it was made to say.
    scores = logits[asking].log_softmax(dim=-1) if asking else logits[:0]
    if penalty != 1:
        penalise(logits, [row.ids for row in rows], penalty)
    for row, scored in zip(rows, logits, strict=True):
        if row.grammar:
            try:
                row.grammar.restrict(scored)
            except InvalidInput as refusal:
                row.end(refusal)
    tokens = choose(logits, [row.sampler for row in rows])
    for row, token in zip(rows, tokens, strict=True):
        if token is None:
            row.end(EngineError("The model computed no numbers (NaN or infinity) for this prompt."))
    if asking:
        tell([row.logprobs for row in rows if row.logprobs], scores, [tokens[at] or 0 for at in asking])
    return [None if row.ended.is_set() else token for row, token in zip(rows, tokens, strict=True)]


class Draw(LogitsProcessor):  # type: ignore[misc]
    """The same inside transformers' generate(): leaves one token of each row possible, the one that it draws."""

    def __init__(self, rows: Sequence[Row], penalty: float) -> None:
        """rows: those of the pass, in its order. penalty: as for draw()."""
        self._rows = rows
        self._penalty = penalty

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        for at, token in enumerate(draw(self._rows, scores.to(torch.float32, copy=True), self._penalty)):
            # A row without a token has ended.
            only[at, token or 0] = 0
        return only
