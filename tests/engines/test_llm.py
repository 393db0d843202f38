import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engines.catalogue import JobType
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    InvalidInput,
    JobCancelled,
    JobInterrupted,
    JobReleased,
    JobTimedOut,
    OutOfMemory,
    Progress,
    Text,
)
from engines.llm.engine import SLOTS, Engine
from engines.loading import resolve
from engines.schemas import load_params

FAMILIES = ["qwen2", "llama", "qwen3", "gemma3", "mistral", "glm", "deepseek_v2"]
CPU = Device("cpu", dtype="float32")


def chats(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Questions of very different lengths, some longer than one prefill pass and all windows, with max_tokens."""
    dice = random.Random(seed)
    words = ["fox", "dog", "你好", "hello", "how", "今天", "quick", "brown"]
    lengths = [dice.choice([1, 3, 10, 40, 120]) for _ in range(count)]
    return [(" ".join(dice.choices(words, k=length)), dice.choice([1, 5, 20, 33])) for length in lengths]


@contextmanager
def before_forward(act: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call act with the arguments of every forward pass of a Qwen2 model: the place where a device would fail."""
    original = transformers.Qwen2ForCausalLM.forward

    def forward(self: Any, **kwargs: Any) -> Any:
        act(kwargs)
        return original(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Qwen2ForCausalLM, "forward", forward)
        yield


def fail_with(error: Exception) -> Callable[[dict[str, Any]], None]:
    def act(_: dict[str, Any]) -> None:
        raise error

    return act


def fill(engine: Engine, ask: Any, stop: threading.Event) -> tuple[ThreadPoolExecutor, list[Any]]:
    """Keep every slot busy until `stop`; returns once all of them generate."""
    generating = threading.Semaphore(0)

    def report(event: Progress | Text) -> None:
        if stop.is_set():
            raise JobReleased
        if isinstance(event, Progress) and event.done == 1:
            generating.release()

    pool = ThreadPoolExecutor(SLOTS + 1)
    futures = [pool.submit(ask, engine, f"{n}", report, max_tokens=1000) for n in range(SLOTS)]
    for _ in futures:
        assert generating.acquire(timeout=20)
    return pool, futures


# --- the same answer as generate()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate_alone_and_under_random_joins_and_leaves(
    family: str, engine_of: Any, generate: Any, ask: Any
) -> None:
    engine = engine_of(family)
    questions = chats(16)
    expected = [generate(family, text, max_tokens) for text, max_tokens in questions]

    alone = [ask(engine, text, max_tokens=max_tokens) for text, max_tokens in questions[:4]]
    dice = random.Random(1)

    def late(question: tuple[str, int]) -> dict[str, Any]:
        time.sleep(dice.random() * 0.05)
        return ask(engine, question[0], max_tokens=question[1])

    with ThreadPoolExecutor(18) as pool:
        together = list(pool.map(late, questions))

    assert engine.slots == SLOTS
    assert [(answer["response"], answer["usage"]["completion_tokens"]) for answer in alone] == expected[:4]
    assert [(answer["response"], answer["usage"]["completion_tokens"]) for answer in together] == expected


def test_a_model_that_keeps_more_than_keys_and_values_is_computed_one_by_one_with_the_same_answers(
    engine_of: Any, generate: Any, ask: Any, recorder: Any
) -> None:
    engine = engine_of("lfm2")
    questions = chats(5)
    heard = recorder()

    answers = [ask(engine, text, max_tokens=max_tokens) for text, max_tokens in questions]
    streamed = ask(engine, "hello", heard)
    with pytest.raises(JobCancelled):
        ask(engine, "hello", recorder(JobCancelled(), at=3), max_tokens=500)
    seeded = [ask(engine, "hello", temperature=1.0, seed=3)["response"] for _ in range(2)]

    assert engine.slots == 1
    assert [answer["response"] for answer in answers] == [generate("lfm2", *question)[0] for question in questions]
    assert heard.text == streamed["response"]
    assert seeded[0] == seeded[1]


# --- sampling


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine_of: Any, ask: Any) -> None:
    engine = engine_of("qwen2")
    options = {"temperature": 0.9, "top_p": 0.95}

    alone = [ask(engine, "hello", seed=seed, **options)["response"] for seed in range(8)]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(ask, engine, text, max_tokens=n) for text, n in chats(8)]
        together = list(pool.map(lambda seed: ask(engine, "hello", seed=seed, **options)["response"], range(8)))
        for other in others:
            other.result()

    assert together == alone
    assert len(set(alone)) > 1


def test_without_a_seed_answers_differ(engine_of: Any, ask: Any) -> None:
    answers = {ask(engine_of("qwen2"), "hello", temperature=2.0)["response"] for _ in range(4)}

    assert len(answers) > 1


# --- where an answer ends


def test_max_tokens_ends_an_answer_with_length_and_exact_usage(engine_of: Any, ask: Any, recorder: Any) -> None:
    heard = recorder()

    answer = ask(engine_of("qwen2"), "hello", heard, max_tokens=7)

    usage = answer["usage"]
    assert answer["finish_reason"] == "length"
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert heard.steps[-7:] == [1, 2, 3, 4, 5, 6, 7]


def test_every_token_of_the_generation_config_s_eos_list_ends_an_answer(
    checkpoint: Any, tmp_path: Path, generate: Any, ask: Any
) -> None:
    source = checkpoint("qwen2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    greedy = network.generate(
        **tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ),
        max_new_tokens=10,
        do_sample=False,
    )[0, -10:].tolist()
    end = next(token for token in greedy[2:] if token not in greedy[:2])
    network.generation_config.eos_token_id = [tokenizer.pad_token_id, end]
    network.save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    engine = Engine(resolve(JobType.LLM, str(tmp_path / "ends")), CPU)
    answer = ask(engine, "hello")
    engine.close()

    before = greedy[: greedy.index(end)]
    assert answer["finish_reason"] == "stop"
    assert answer["response"] == tokenizer.decode(before, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(before) + 1


def test_a_stop_string_is_cut_off_and_never_shown_even_in_part(engine_of: Any, ask: Any, recorder: Any) -> None:
    engine, heard = engine_of("qwen2"), recorder()
    whole = ask(engine, "hello", max_tokens=60)["response"]
    stop = whole[20:26]

    answer = ask(engine, "hello", heard, max_tokens=60, stop=["never there", stop])

    assert answer["response"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert heard.text == answer["response"]


def test_the_streamed_text_is_the_decoded_answer_even_where_characters_span_tokens_or_stay_incomplete(
    engine_of: Any, generate: Any, ask: Any, recorder: Any
) -> None:
    engine = engine_of("llama")

    for text, _ in chats(6, seed=2):
        for max_tokens in (1, 2, 30):
            heard = recorder()
            answer = ask(engine, text, heard, max_tokens=max_tokens)
            assert answer["response"] == heard.text == generate("llama", text, max_tokens)[0]


# --- what a prompt may be


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine_of: Any, ask: Any) -> None:
    with pytest.raises(InvalidInput, match=r"has \d{4,} tokens.* takes 1024") as refused:
        ask(engine_of("qwen2"), "quick brown " * 1000)

    assert refused.value.code == "prompt_too_long"


def test_max_tokens_is_cut_to_what_the_context_leaves(engine_of: Any, ask: Any) -> None:
    answer = ask(engine_of("qwen2"), "hello " * 150, max_tokens=5000)

    assert answer["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 1024


def test_messages_that_the_chat_template_refuses_are_the_job_s_fault(engine_of: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}]

    with pytest.raises(InvalidInput, match="system comes first"):
        engine_of("qwen2").run(load_params(JobType.LLM, {"messages": messages}), lambda _: None)


# --- stopping one job


@pytest.mark.parametrize("interruption", [JobCancelled, JobTimedOut, JobReleased])
def test_an_interruption_stops_that_job_within_one_step_and_no_other(
    interruption: type[JobInterrupted], engine_of: Any, generate: Any, ask: Any, recorder: Any
) -> None:
    engine = engine_of("qwen2")
    questions = chats(10, seed=3)
    stopped = recorder(interruption(), at=4)

    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(ask, engine, text, max_tokens=n) for text, n in questions]
        with pytest.raises(interruption):
            ask(engine, "hello", stopped, max_tokens=900)
        answers = [other.result()["response"] for other in others]

    assert stopped.steps[-1] == 4
    assert answers == [generate("qwen2", *question)[0] for question in questions]


def test_a_job_that_waits_for_a_slot_can_be_cancelled(engine_of: Any, ask: Any, recorder: Any) -> None:
    engine, stop, waiting = engine_of("qwen2"), threading.Event(), recorder(JobCancelled())
    pool, futures = fill(engine, ask, stop)

    with pytest.raises(JobCancelled):
        ask(engine, "I wait", waiting)
    busy = sum(not future.done() for future in futures)
    stop.set()
    pool.shutdown()

    assert busy == SLOTS
    assert waiting.steps == [0]
    assert all(isinstance(future.exception(), JobReleased) for future in futures)


def test_a_report_that_fails_fails_its_own_job_alone(engine_of: Any, generate: Any, ask: Any, recorder: Any) -> None:
    engine = engine_of("qwen2")

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, engine, "fox", max_tokens=33)
        with pytest.raises(ConnectionError):
            ask(engine, "hello", recorder(ConnectionError("the store is away"), at=2))

    assert other.result()["response"] == generate("qwen2", "fox", 33)[0]


# --- when the device fails


def test_a_step_that_fails_fails_its_jobs_and_the_next_ones_run(tiny_model: Any, generate: Any, ask: Any) -> None:
    engine = Engine(tiny_model("qwen2"), CPU)

    with (
        before_forward(fail_with(ValueError("shapes do not match"))),
        pytest.raises(EngineError, match="shapes do not match"),
    ):
        ask(engine, "hello")
    answer = ask(engine, "hello")
    engine.close()

    assert answer["response"] == generate("qwen2", "hello", 24)[0]


def test_a_sticky_gpu_error_breaks_the_engine_for_good(tiny_model: Any, ask: Any) -> None:
    engine = Engine(tiny_model("qwen2"), CPU)

    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with before_forward(fail_with(error)), pytest.raises(EngineBroken):
        ask(engine, "hello")

    with pytest.raises(EngineBroken, match="device-side assert"):
        ask(engine, "hello")


def test_out_of_memory_makes_the_youngest_rows_wait_and_all_answers_stay_right(
    tiny_model: Any, generate: Any, ask: Any
) -> None:
    engine = Engine(tiny_model("qwen2"), CPU)
    most = []

    def fail(kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[0] > 3:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        most.append(kwargs["input_ids"].shape[0])

    with before_forward(fail), ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: ask(engine, f"fox {n}", max_tokens=33)["response"], range(6)))
    engine.close()

    assert max(most) == 3
    assert answers == [generate("qwen2", f"fox {n}", 33)[0] for n in range(6)]


def test_a_job_that_is_out_of_memory_alone_fails_with_numbers(tiny_model: Any, ask: Any) -> None:
    engine = Engine(tiny_model("qwen2"), CPU)

    with (
        before_forward(fail_with(torch.OutOfMemoryError("tried to allocate 2 GiB"))),
        pytest.raises(OutOfMemory, match=r"\d+ tokens.*GiB are free.*2 GiB"),
    ):
        ask(engine, "hello")
    assert ask(engine, "hello")["response"]
    engine.close()


def test_rows_that_outgrow_the_cache_s_budget_are_computed_again_with_the_same_answers(
    tiny_model: Any, generate: Any, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tiny_model("qwen2"), Device("cpu", dtype="float32", max_memory_gib=3 / 1024))
    questions = [f"{number}" + " brown" * 200 for number in range(8)]
    drawn = {"max_tokens": 100, "temperature": 1.0, "seed": 1}

    with ThreadPoolExecutor(9) as pool:
        sampled = pool.submit(ask, engine, questions[0], **drawn)
        greedy = list(pool.map(lambda text: ask(engine, text, max_tokens=100)["response"], questions))
    alone = ask(engine, questions[0], **drawn)
    slots = engine.slots
    engine.close()

    assert 8 < slots < SLOTS
    assert "1 wait again" in caplog.text
    assert greedy == [generate("qwen2", text, 100)[0] for text in questions]
    assert sampled.result() == alone


# --- the end


def test_close_ends_running_and_waiting_jobs_with_engine_broken(tiny_model: Any, ask: Any) -> None:
    engine, never = Engine(tiny_model("qwen2"), CPU), threading.Event()
    pool, futures = fill(engine, ask, never)
    waiting = pool.submit(ask, engine, "I wait")

    engine.close()
    pool.shutdown()

    assert all(isinstance(future.exception(), EngineBroken) for future in [*futures, waiting])
    with pytest.raises(EngineBroken, match="closed"):
        ask(engine, "hello")
