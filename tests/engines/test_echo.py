import json
import time
from typing import Any

import pytest

from engines.catalogue import JobType
from engines.contract import Device, EngineBroken, EngineError, JobCancelled, OutOfMemory, Text
from engines.loading import load, resolve
from engines.schemas import RESULTS


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


def test_it_gives_several_answers_word_by_word_with_well_formed_logprobs(echo: Any, ask: Any, recorder: Any) -> None:
    heard = recorder()

    answer = ask(echo, "one two three", heard, n=2, logprobs=True, top_logprobs=3)

    assert RESULTS[JobType.LLM].validate(answer) == {}
    assert [choice["response"] for choice in answer["choices"]] == ["one two three"] * 2
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    for choice in answer["choices"]:
        told = [event for event in heard.heard if isinstance(event, Text) and event.choice == choice["index"]]
        assert [event.delta for event in told] == ["one", " two", " three"]
        assert [entry for event in told for entry in event.logprobs] == choice["logprobs"]
        assert all(len(entry["top_logprobs"]) == 3 for entry in choice["logprobs"])


def test_asked_for_json_it_gives_the_least_that_the_schema_allows(echo: Any, ask: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["fox", "dog"]},
            "name": {"type": "string"},
            "legs": {"type": "integer", "minimum": 2},
            "tags": {"type": "array", "items": {"type": "string"}},
            "home": {"$ref": "#/$defs/place"},
            "note": {"type": "string"},
        },
        "required": ["kind", "name", "legs", "tags", "home"],
        "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "string"}]}},
    }

    answer = ask(echo, "hi", response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    plain = ask(echo, "hi", response_format={"type": "json_object"})

    assert json.loads(answer["response"]) == {"kind": "fox", "name": "", "legs": 2, "tags": [], "home": None}
    assert json.loads(plain["response"]) == {}
