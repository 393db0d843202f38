"""A transformers model that computes many conversations at once, each in a slot of one cache.

Works for every model whose layers attend to all tokens or to a window of them; `is_plain` says whether one does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from engines.llm.slot_cache import Plan, SlotCache

#: Largest relative error of the probe's logits, per dtype: rounding stays far below, a wrong mask or place far above.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class SlotNetwork:
    """The forward passes over slots. Positions count from 0 within each conversation."""

    def __init__(self, network: Any, slots: int) -> None:
        """network: a causal language model that is_plain()."""
        self.cache = SlotCache(network.config.get_text_config().num_hidden_layers, slots)
        self._network = network
        self._device = network.device
        self._windows = _windows(network)

    def read_prompts(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> torch.Tensor:
        """Read whole prompts into empty slots; the logits behind each, float32, shape (prompts, vocabulary).

        They are laid behind each other in one sequence and masked from each other, so that nothing is padded.
        """
        lengths = [len(prompt) for prompt in prompts]
        positions = [position for length in lengths for position in range(length)]
        owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        where, owner = self._tensor([positions]), self._tensor([owners])
        allowed = (owner[:, :, None] == owner[:, None, :]) & (where[:, None, :] <= where[:, :, None])
        logits = self._forward(
            [[token for prompt in prompts for token in prompt]],
            where,
            Plan(self._places(owners, positions), None),
            self._masks(allowed, where[:, :, None] - where[:, None, :]),
            keep=self._tensor(lengths).cumsum(0) - 1,
        )
        return logits[0]

    def read_piece(self, tokens: Sequence[int], start: int, slot: int) -> torch.Tensor:
        """Read a piece of a prompt that begins at position `start`; the logits behind it, shape (1, vocabulary)."""
        end = start + len(tokens)
        positions = list(range(start, end))
        plan = Plan(self._places([slot] * len(tokens), positions), (slot, slot + 1, end))
        return self._attend([list(tokens)], [positions], plan, end)[:, -1]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Add one token to each of the first slots; the logits behind it, shape (slots, vocabulary).

        A position of -1 leaves that slot as it is; its logits mean nothing.
        """
        plan = Plan(self._places(range(len(tokens)), positions), (0, len(tokens), max(positions) + 1))
        clamped = [[max(position, 0)] for position in positions]
        return self._attend([[token] for token in tokens], clamped, plan, max(positions) + 1)[:, -1]

    def _attend(self, ids: list[list[int]], positions: list[list[int]], plan: Plan, columns: int) -> torch.Tensor:
        where = self._tensor(positions)
        distance = where[:, :, None] - torch.arange(columns, device=self._device)
        return self._forward(ids, where, plan, self._masks(distance >= 0, distance), keep=1)

    def _forward(
        self, ids: list[list[int]], positions: torch.Tensor, plan: Plan, masks: Any, keep: int | torch.Tensor
    ) -> torch.Tensor:
        self.cache.plan = plan
        output = self._network(
            input_ids=self._tensor(ids),
            position_ids=positions,
            attention_mask=masks,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits.float()
        return logits

    def _masks(self, allowed: torch.Tensor, distance: torch.Tensor) -> Any:
        """The masks that the layers ask for, ready made: shape (rows, 1, queries, columns), true where one may look.

        allowed, distance: shape (rows, queries, columns), distance in tokens from the query back to the column.
        """
        masks = {
            kind: self._ready(allowed if window is None else allowed & (distance < window))
            for kind, window in self._windows.items()
        }
        # Models with both kinds of layers take both by name; the others take what there is.
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _ready(self, allowed: torch.Tensor) -> torch.Tensor:
        allowed = allowed[:, None]
        if self._network.config.get_text_config()._attn_implementation != "eager":
            return allowed
        # Eager attention adds its mask to the scores.
        lowest = torch.finfo(self._network.dtype).min
        return torch.zeros_like(allowed, dtype=self._network.dtype).masked_fill(~allowed, lowest)

    def _places(self, rows: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
        return self._tensor(self.cache.places(rows, columns))

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values).to(self._device, non_blocking=True)


def is_plain(network: Any) -> bool:
    """Whether all layers of a model keep the keys and values of single tokens, and nothing else."""
    layers = DynamicCache(config=network.config).layers
    kinds = set(getattr(network.config.get_text_config(), "layer_types", None) or ["full_attention"])
    # Not isinstance: recurrent layers that also attend inherit from these two.
    return kinds <= {"full_attention", "sliding_attention"} and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def probe(slots: SlotNetwork, network: Any, texts: tuple[Sequence[int], Sequence[int]]) -> float:
    """The relative error of the logits against plain forward passes; also warms the model up.

    texts: token ids of two texts of different length, at least 5 each. Uses slots 0 and 1 and leaves them filled.
    """
    known = [network(input_ids=torch.tensor([text], device=network.device)).logits[0].float() for text in texts]
    slots.cache.hold(2, max(map(len, texts)))
    half = [len(text) // 2 for text in texts]
    packed = slots.read_prompts([text[:end] for text, end in zip(texts, half, strict=True)], [0, 1])
    # From here both go on together, the first one after a piece that is read alone.
    piece = slots.read_piece(texts[0][half[0] : half[0] + 2], half[0], 0)
    half[0] += 2
    pairs = [(packed[0], known[0][half[0] - 3]), (packed[1], known[1][half[1] - 1]), (piece[0], known[0][half[0] - 1])]
    while all(at < len(text) for at, text in zip(half, texts, strict=True)):
        logits = slots.step([text[at] for at, text in zip(half, texts, strict=True)], half)
        pairs += [(logits[row], known[row][at]) for row, at in enumerate(half)]
        half = [at + 1 for at in half]
    found, wanted = (torch.stack(side) for side in zip(*pairs, strict=True))
    # Without their mean, which no choice of a token depends on and which can hide what differs.
    found, wanted = (side - side.mean(dim=-1, keepdim=True) for side in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def _windows(network: Any) -> dict[str, int | None]:
    """Every kind of layer that a plain model has, with the tokens it looks back on; None for all."""
    layers = DynamicCache(config=network.config).layers
    return {
        "sliding_attention" if layer.is_sliding else "full_attention": layer.sliding_window
        if layer.is_sliding
        else None
        for layer in layers
    }
