"""Choosing the next token of each row, by that row's own settings and its own random numbers."""

from collections.abc import Sequence

import torch

#: How many of the most probable tokens are looked at, until they are enough; only then is the whole vocabulary sorted,
#: which for 50,000 tokens takes as long as a tenth of a step (15 ms a row, against 0.5 ms for the first 256).
HEADS = (256, 4096)


class Sampler:
    """How one request draws its tokens. The same seed draws the same tokens, alone or beside others."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """temperature: 0 takes the most probable token. seed: None draws a new one."""
        self.temperature = temperature
        self.top_p = top_p
        # On the CPU, so that a seed means the same on every device; one per request, so that no neighbour moves it on.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def uniform(self) -> float:
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row; None where the model gave no numbers (NaN or infinity).

    logits: float32, shape (rows, vocabulary).
    """
    highest, best = logits.max(dim=-1)
    finite, tokens = torch.isfinite(highest).tolist(), best.tolist()
    drawn = [row for row, sampler in enumerate(samplers) if sampler.temperature > 0 and finite[row]]
    if drawn:
        for row, token in zip(drawn, _draw(logits[drawn], [samplers[row] for row in drawn]), strict=True):
            tokens[row] = token
    return [token if good else None for token, good in zip(tokens, finite, strict=True)]


def penalise(logits: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> None:
    """Make the tokens that each row has seen less likely, in place.

    Source: transformers, RepetitionPenaltyLogitsProcessor; some models (Qwen2.5) ask for it in their generation config.
    """
    for row, ids in zip(logits, seen, strict=True):
        known = torch.tensor(sorted(set(ids)), device=logits.device)
        scores = row[known]
        row[known] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token a row from its top_p nucleus: one uniform number each, through the inverse of the cumulated sum."""
    heat = torch.tensor([sampler.temperature for sampler in samplers], device=logits.device)
    probabilities = torch.softmax(logits / heat[:, None], dim=-1)
    uniforms = [sampler.uniform() for sampler in samplers]
    chosen: dict[int, int] = {}
    for size in (*HEADS, probabilities.shape[-1]):
        rows = [row for row in range(len(samplers)) if row not in chosen]
        if not rows:
            break
        top, tokens = probabilities[rows].topk(min(size, probabilities.shape[-1]), dim=-1)
        sums = top.cumsum(dim=-1, dtype=torch.float64)
        for at, (row, mass) in enumerate(zip(rows, sums[:, -1].tolist(), strict=True)):
            top_p = samplers[row].top_p
            # Without a nucleus only the place that the uniform number points to must be among these tokens.
            if mass > (top_p if top_p < 1 else uniforms[row]) or size == probabilities.shape[-1]:
                chosen[row] = _pick(sums[at], tokens[at], top_p, uniforms[row])
    return [chosen[row] for row in range(len(samplers))]


def _pick(sums: torch.Tensor, tokens: torch.Tensor, top_p: float, uniform: float) -> int:
    """The token where the cumulated sum passes `uniform` of the nucleus: the fewest tokens that hold top_p."""
    total = 1.0
    if top_p < 1:
        last = min(int(torch.searchsorted(sums, top_p)), len(sums) - 1)
        total = float(sums[last])
    # Behind the last possible token stand those that a grammar rules out; rounding must not lead there.
    possible = int(torch.searchsorted(sums, float(sums[-1])))
    index = min(int(torch.searchsorted(sums, uniform * total, right=True)), possible)
    return int(tokens[index])
