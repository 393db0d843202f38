import time
from typing import Any

import pytest

from engines.catalogue import JobType
from engines.contract import Device, EngineBroken, EngineError, JobCancelled, OutOfMemory
from engines.loading import load, resolve


@pytest.fixture
def echo() -> Any:
    return load(resolve(JobType.LLM, "echo"), Device("cpu"))


def test_it_repeats_the_last_user_message_up_to_max_tokens_words(echo: Any, ask: Any) -> None:
    whole = ask(echo, "one two three")
    cut = ask(echo, "one two three", max_tokens=2)

    assert (whole["response"], whole["finish_reason"]) == ("one two three", "stop")
    assert (cut["response"], cut["finish_reason"]) == ("one two", "length")
    assert cut["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_sleeping_job_can_be_cancelled_and_a_hanging_one_cannot(echo: Any, ask: Any, recorder: Any) -> None:
    start = time.monotonic()
    with pytest.raises(JobCancelled):
        ask(echo, "sleep 30", recorder(JobCancelled(), at=40))
    cancelled_after = time.monotonic() - start

    hung = ask(echo, "hang 0.2", recorder())

    assert cancelled_after < 2
    assert hung["response"] == "hang 0.2"


@pytest.mark.parametrize(
    ("instruction", "error"), [("fail", EngineError), ("oom", OutOfMemory), ("broken", EngineBroken)]
)
def test_it_fails_as_told(instruction: str, error: type[EngineError], echo: Any, ask: Any) -> None:
    with pytest.raises(error) as raised:
        ask(echo, instruction)

    assert type(raised.value) is error
