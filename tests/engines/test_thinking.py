from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.text.thinking import MARKS, Reading, Spoken, read


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("A red box.", "A red box."),
        (" A red box.\n", " A red box.\n"),
        ("<think>Is it red?</think><answer>It is red.</answer>", "It is red."),
        ("\n<think>Is it\nred?</think>\n<answer>\nIt is red.\n</answer>\n", "It is red."),
        ("<think>Is it red?</think>\n\nIt is red.", "It is red."),
        ("<answer>It is red.</answer>", "It is red."),
        ("<think></think><answer><|begin_of_box|>3<|end_of_box|></answer>", "3"),
        ("There are <|begin_of_box|>3<|end_of_box|> boxes.", "There are 3 boxes."),
        ("<think>Hm.</think><answer>It was cut of", "It was cut of"),
        ("In HTML, <think> and <answer> are no tags.", "In HTML, <think> and <answer> are no tags."),
        ("<think>The <answer> comes next.</think>Blue", "Blue"),
        ("a < b <|", "a < b <|"),
        ("<", "<"),
        ("", ""),
    ],
)
def test_the_answer_is_what_is_left_without_thoughts_and_marks(said: str, answer: str) -> None:
    assert read(said) == Reading(answer)


@pytest.mark.parametrize("said", ["<think>", "<think>I see a box, whi", "<think>It is </thin"])
def test_an_output_that_ends_inside_its_thought_has_no_answer(said: str) -> None:
    assert read(said) == Reading("", thinking=True)


def test_a_thought_that_the_prompt_began_ends_with_its_mark_alone() -> None:
    assert read("I see a box.</think>A box.", opened=True) == Reading("A box.")
    assert read("I see a box.", opened=True) == Reading("", thinking=True)


# Without a deadline: a busy machine would be late now and then.
@settings(deadline=None)
@given(
    some.lists(some.sampled_from([*MARKS, " ", "\n", "a", "<", "<th", "<|be", "in", "_box|>", "</"])), some.booleans()
)
def test_what_is_shown_while_the_output_grows_is_never_taken_back(pieces: list[str], opened: bool) -> None:
    said = "".join(pieces)
    shown = ""

    for end in range(len(said) + 1):
        now = read(said[:end], complete=False, opened=opened).answer
        assert now.startswith(shown)
        shown = now
    assert read(said, opened=opened).answer.startswith(shown)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level; <think> and the boxes are special tokens, <answer> is plain text, as models do both."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<think>", "</think>", "<|begin_of_box|>", "<|end_of_box|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a red box"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
    fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    backend: Tokenizer = fast.backend_tokenizer
    return backend


def spoken(tokenizer: Tokenizer, said: str, opened: bool = False) -> tuple[Spoken, list[str]]:
    answer = Spoken(tokenizer, opened)
    pieces = [answer.add(token) for token in tokenizer.encode(said).ids]
    return answer, [*pieces, answer.close()]


def test_an_answer_is_streamed_from_the_moment_the_thought_ends(tokenizer: Tokenizer) -> None:
    answer, pieces = spoken(
        tokenizer, "<think>红色?</think>\n<answer>一个<|begin_of_box|>红色<|end_of_box|>的方块</answer>"
    )

    assert answer.text == "".join(pieces) == "一个红色的方块"
    assert sum(map(bool, pieces)) == 7
    assert not answer.thinking


def test_a_plain_answer_streams_as_it_comes_without_other_special_tokens(tokenizer: Tokenizer) -> None:
    answer, pieces = spoken(tokenizer, "a red<|im_start|> box")

    assert answer.text == "".join(pieces) == "a red box"
    assert pieces[0] == "a"


def test_a_thought_that_never_ends_streams_nothing(tokenizer: Tokenizer) -> None:
    answer, pieces = spoken(tokenizer, "I see a red box and", opened=True)

    assert "".join(pieces) == answer.text == ""
    assert answer.thinking
