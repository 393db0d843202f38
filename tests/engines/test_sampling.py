from collections import Counter

import pytest
import torch

from engines.text.sampling import HEADS, Sampler, choose, penalise


def test_temperature_0_takes_the_most_probable_token_whatever_the_seed() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])

    assert choose(logits, [Sampler(0, 1.0, 1), Sampler(0, 0.1, None)]) == [1, 0]


def test_a_row_without_numbers_gets_no_token_and_its_neighbours_do() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0], [float("inf"), 0.0]])

    assert choose(logits, [Sampler(0.7, 0.9, 1), Sampler(0, 1.0, 1), Sampler(0, 1.0, 1)]) == [None, 1, None]


def test_tokens_are_drawn_as_often_as_they_are_probable_and_only_from_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    everything, nucleus = Sampler(1.0, 1.0, 1), Sampler(1.0, 0.75, 1)

    drawn = Counter(choose(logits, [everything])[0] for _ in range(4000))
    narrow = Counter(choose(logits, [nucleus])[0] for _ in range(4000))

    assert [drawn[token] / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert [narrow[token] / 4000 for token in range(4)] == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)


@pytest.mark.parametrize("top_p", [0.5, 0.99, 1.0])
def test_a_flat_distribution_over_a_large_vocabulary_is_drawn_from_all_over_it(top_p: float) -> None:
    size = 4 * HEADS[-1]
    sampler = Sampler(1.0, top_p, 1)

    drawn = [token for _ in range(50) for token in choose(torch.zeros(1, size), [sampler]) if token is not None]

    assert len(set(drawn)) > 45


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = torch.tensor([[2.0, -1.0, 0.5, 3.0]]), [0, 1, 1]
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits.clone())

    penalise(logits, [seen], 1.3)

    assert torch.equal(logits, wanted)
