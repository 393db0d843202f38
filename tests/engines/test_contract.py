"""What holds for every engine."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engines.catalogue import JobType
from engines.contract import Device, Engine, EngineBroken, JobCancelled, JobTimedOut, Progress, Text
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params

QUESTION = {JobType.LLM: {"messages": [{"role": "user", "content": "hello you"}], "max_tokens": 6}}


@pytest.fixture(params=["echo", "qwen2", "lfm2"])
def subject(request: pytest.FixtureRequest, checkpoint: Any) -> Iterator[tuple[JobType, Engine]]:
    name = request.param if request.param == "echo" else str(checkpoint(request.param))
    engine = load(resolve(JobType.LLM, name), Device("cpu", dtype="float32"))
    yield JobType.LLM, engine
    engine.close()


def test_as_many_jobs_as_there_are_slots_get_results_that_the_schema_accepts(
    subject: tuple[JobType, Engine],
) -> None:
    job_type, engine = subject
    params = load_params(job_type, QUESTION[job_type])

    with ThreadPoolExecutor(engine.slots) as pool:
        results = list(pool.map(lambda _: engine.run(params, lambda _: None), range(engine.slots)))

    assert len(results) == engine.slots
    assert all(RESULTS[job_type].validate(result) == {} for result in results)


def test_reports_climb_and_the_text_they_carry_is_the_answer(subject: tuple[JobType, Engine], recorder: Any) -> None:
    job_type, engine = subject
    heard = recorder()

    result = engine.run(load_params(job_type, QUESTION[job_type]), heard)

    assert heard.steps == sorted(heard.steps)
    assert heard.text == result["response"]
    assert {type(event) for event in heard.heard} == {Progress, Text}


@pytest.mark.parametrize("interruption", [JobCancelled("by its owner"), JobTimedOut("after 3 s")])
def test_what_report_raises_comes_out_of_run_and_the_next_job_runs(
    subject: tuple[JobType, Engine], interruption: Exception, recorder: Any
) -> None:
    job_type, engine = subject
    params = load_params(job_type, QUESTION[job_type])

    with pytest.raises(type(interruption)) as raised:
        engine.run(params, recorder(interruption))

    assert raised.value is interruption
    assert engine.run(params, recorder())["response"]


def test_a_closed_engine_says_so_at_once_and_can_be_closed_again(subject: tuple[JobType, Engine]) -> None:
    job_type, engine = subject

    engine.close()
    engine.close()

    with pytest.raises(EngineBroken):
        engine.run(load_params(job_type, QUESTION[job_type]), lambda _: None)
