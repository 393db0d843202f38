"""One question about a picture, from its submission to its end."""

from collections.abc import Collection, Mapping, Sequence

import torch

from engines.contract import Progress, Report, Text
from engines.text.row import Row
from engines.text.sampling import Sampler
from engines.text.thinking import Spoken


class Question(Row):
    """A row whose prompt holds a picture."""

    advice = "Send a smaller picture, a shorter question or fewer max_tokens."
    answer: Spoken

    def __init__(
        self,
        inputs: Mapping[str, torch.Tensor],
        picture_size: tuple[int, int],
        max_tokens: int,
        answer: Spoken,
        end_tokens: Collection[int],
        sampler: Sampler,
        report: Report,
    ) -> None:
        """inputs: what the processor made of the question and its picture. picture_size: width and height in pixels."""
        super().__init__(inputs["input_ids"][0].tolist(), max_tokens, sampler, answer, end_tokens, report)
        self.inputs = inputs
        self.picture_size = picture_size

    @property
    def size(self) -> str:
        """The picture, and the whole text with what it takes in it."""
        width, height = self.picture_size
        return f"A picture of {width} x {height} pixels with {len(self.ids)} tokens"

    @property
    def generated(self) -> Sequence[int]:
        """The tokens of the answer so far."""
        return self.ids[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.max_tokens - self.completion_tokens

    def tell(self, event: Progress | Text) -> None:
        """Report an event; ends the question if its job must stop."""
        # A pass counts its own steps; how far an answer is differs from one to the next.
        if isinstance(event, Progress):
            event = Progress(self.completion_tokens, self.max_tokens, "token")
        super().tell(event)
