import base64
import io
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

from engines.catalogue import JobType
from engines.contract import (
    Device,
    Engine,
    EngineBroken,
    EngineError,
    EngineLoadError,
    InvalidInput,
    JobCancelled,
    JobReleased,
    JobTimedOut,
    OutOfMemory,
    Progress,
    Text,
)
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from engines.text.thinking import Spoken
from engines.vision import picture
from engines.vision.engine import GREEDY
from engines.vision.question import Question
from engines.vision.viewer import Viewer
from shapes.world import SCENES, draw
from tests.engines import tiny_vision

CPU = Device("cpu", dtype="float32")
Qwen = transformers.Qwen2VLForConditionalGeneration


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def base64_of(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


#: Pictures of different shapes with questions of different lengths and different lengths of answer.
QUESTIONS = [
    (noise(100, 60), "What?", 6),
    (noise(40, 90, 1), "这张图片里有什么？" * 3, 17),
    (noise(1, 1, 2), "What is this? " * 4, 1),
    (noise(130, 30, 3), "Is it red, blue or green?", 12),
]


def ask(
    engine: Engine, image: Image.Image, question: str | None, max_tokens: int = 12, report: Any = None, **more: Any
) -> dict[str, Any]:
    params = {"image_base64": base64_of(image), "question": question, "max_tokens": max_tokens, **more}
    result = engine.run(load_params(JobType.VISION, params), report or (lambda _: None))
    assert RESULTS[JobType.VISION].validate(result) == {}
    return result


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: tiny_vision.build(family, tmp_path_factory.mktemp("vision") / family))


@pytest.fixture(scope="session")
def engine_of(folder: Any) -> Iterator[Callable[[str], Engine]]:
    """The engine of a family, loaded once; tests that break or close one load their own."""
    loaded: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in loaded:
            loaded[family] = load(resolve(JobType.VISION, str(folder(family))), CPU)
        return loaded[family]

    yield get
    for engine in loaded.values():
        engine.close()


@pytest.fixture
def own(folder: Any) -> Iterator[Callable[..., Engine]]:
    """An engine for one test, from a family's checkpoint or any folder."""
    engines: list[Engine] = []

    def get(source: str | Path, device: Device = CPU) -> Engine:
        source = folder(source) if isinstance(source, str) else source
        engines.append(load(resolve(JobType.VISION, str(source)), device))
        return engines[-1]

    yield get
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def generate(folder: Any) -> Callable[..., tuple[str, int, list[int]]]:
    """What transformers' own generate() answers, alone and greedy: text, tokens of the prompt, tokens of the answer."""

    @cache
    def parts(family: str) -> tuple[Any, Any]:
        source = folder(family)
        network = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
        return network, transformers.AutoProcessor.from_pretrained(source)

    def answer(family: str, image: Image.Image, prompt: str, max_tokens: int = 12) -> tuple[str, int, list[int]]:
        network, processor = parts(family)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        # What a picture of one pixel is enlarged to.
        image = image.resize((4, 4)) if image.size == (1, 1) else image
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        output = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        prompt_tokens = inputs["input_ids"].shape[1]
        ids = output[0, prompt_tokens:].tolist()
        return processor.tokenizer.decode(ids, skip_special_tokens=True), prompt_tokens, ids

    return answer


@contextmanager
def around_forward(act: Callable[[Callable[..., Any], dict[str, Any]], Any], network: type = Qwen) -> Iterator[None]:
    """Let act make every forward pass of a network: the place where a device would fail."""
    original = network.forward

    @wraps(original)  # generate() looks at its parameters
    def forward(self: Any, **kwargs: Any) -> Any:
        return act(lambda **given: original(self, **given), kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward", forward)
        yield


def fail_with(error: Exception) -> Callable[..., None]:
    def act(forward: Any, kwargs: dict[str, Any]) -> None:
        raise error

    return act


def rows_of(kwargs: dict[str, Any]) -> int:
    return int(kwargs["input_ids"].shape[0])


def together(
    engine: Engine, questions: Sequence[tuple[Image.Image, str, int]], reports: Sequence[Any] | None = None
) -> list[Any]:
    """Futures of the answers to questions that all wait already when the engine becomes free for them."""
    began, everyone, told = threading.Event(), threading.Event(), set[int]()

    def hold(event: Progress | Text) -> None:
        began.set()
        # The waiting ones are told that they wait between two steps of this one.
        if isinstance(event, Progress) and event.done and everyone.wait(0.05):
            raise JobReleased

    def listen(number: int) -> Callable[[Progress | Text], None]:
        def report(event: Progress | Text) -> None:
            told.add(number)
            if len(told) == len(questions):
                everyone.set()
            if reports:
                reports[number](event)

        return report

    with ThreadPoolExecutor(len(questions) + 1) as pool:
        holding = pool.submit(ask, engine, noise(28, 28), "Wait", 400, hold)
        # Or it would share its pass with those that are there by then.
        assert began.wait(10)
        futures = [pool.submit(ask, engine, *question, listen(n)) for n, question in enumerate(questions)]
    assert isinstance(holding.exception(), JobReleased)
    return futures


# --- the same answer as generate()


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_answers_are_those_of_generate_alone_and_in_one_pass(family: str, engine_of: Any, generate: Any) -> None:
    engine, passes = engine_of(family), []
    expected = [generate(family, *question) for question in QUESTIONS]

    def count(forward: Any, kwargs: dict[str, Any]) -> Any:
        passes.append(rows_of(kwargs))
        return forward(**kwargs)

    alone = [ask(engine, *question) for question in QUESTIONS]
    with around_forward(count, tiny_vision.NETWORKS[family]):
        batched = [future.result() for future in together(engine, QUESTIONS)]

    assert engine.slots == 4
    assert max(passes) > 1
    for answers in (alone, batched):
        assert [answer["response"] for answer in answers] == [text for text, _, _ in expected]
        assert [answer["usage"]["prompt_tokens"] for answer in answers] == [prompt for _, prompt, _ in expected]
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [n for _, _, n in QUESTIONS]


@pytest.mark.parametrize(
    ("task", "question", "prompt"),
    [
        ("image_qa", "这是什么？", "这是什么？"),
        ("image_caption", None, "Describe this image in detail."),
        ("image_caption", "用中文回答", "Describe this image in detail.\n用中文回答"),
        (
            "ocr",
            None,
            "Write out all the text in this image exactly as it appears, line by line. Answer with the text only.",
        ),
        (
            "ocr",
            "Only the date.",
            "Write out all the text in this image exactly as it appears, line by line. Answer with the text only.\n"
            "Only the date.",
        ),
    ],
)
def test_each_task_asks_the_model_with_its_own_words(
    task: str, question: str | None, prompt: str, engine_of: Any, generate: Any
) -> None:
    image = noise(80, 60)

    answer = ask(engine_of("qwen2_vl"), image, question, task=task)

    assert (answer["response"], answer["usage"]["prompt_tokens"]) == generate("qwen2_vl", image, prompt)[:2]
    assert answer["task"] == task


def test_the_model_s_own_settings_for_chance_are_set_aside_without_a_word(
    own: Any, caplog: pytest.LogCaptureFixture
) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        engine = own("glm4v")
        answers = {ask(engine, noise(60, 60), "What?")["response"] for _ in range(3)}
    finally:
        library.removeHandler(caplog.handler)

    assert len(answers) == 1
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_model_that_computes_batches_wrongly_answers_one_by_one_and_right(own: Any, generate: Any) -> None:
    def unmasked(forward: Any, kwargs: dict[str, Any]) -> Any:
        if rows_of(kwargs) > 1:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return forward(**kwargs)

    with around_forward(unmasked):
        engine = own("qwen2_vl")
        answers = [future.result()["response"] for future in together(engine, QUESTIONS)]

    assert engine.slots == 1
    assert answers == [generate("qwen2_vl", *question)[0] for question in QUESTIONS]


def test_a_model_that_cannot_compute_batches_answers_one_by_one(own: Any, generate: Any) -> None:
    def single(forward: Any, kwargs: dict[str, Any]) -> Any:
        if rows_of(kwargs) > 1:
            raise IndexError("one picture at a time")
        return forward(**kwargs)

    with around_forward(single):
        engine = own("qwen2_vl")
        answer = ask(engine, *QUESTIONS[0])

    assert engine.slots == 1
    assert answer["response"] == generate("qwen2_vl", *QUESTIONS[0])[0]


# --- where an answer ends, and what is told meanwhile


def test_a_seed_draws_the_same_answer_alone_and_beside_others(engine_of: Any) -> None:
    engine, picture = engine_of("qwen2_vl"), noise(80, 60)
    drawn = {"temperature": 1.5, "max_tokens": 12}

    alone = [ask(engine, picture, "What?", seed=seed, **drawn)["response"] for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: ask(engine, picture, "What?", seed=seed, **drawn)["response"], (1, 2)))

    assert together == alone
    assert alone[0] != alone[1]


def test_max_tokens_ends_an_answer_and_every_token_is_told(engine_of: Any, recorder: Any) -> None:
    heard = recorder()

    answer = ask(engine_of("internvl"), noise(80, 60), "What?", 15, heard)

    usage = answer["usage"]
    assert answer["finish_reason"] == "length"
    assert usage["total_tokens"] == usage["prompt_tokens"] + 15
    assert heard.steps == [*range(16)]
    assert heard.text == answer["response"]
    assert {event.total for event in heard.heard if isinstance(event, Progress)} == {15}


def test_the_generation_config_s_end_tokens_end_an_answer(folder: Any, own: Any, generate: Any, tmp_path: Path) -> None:
    image, source = noise(80, 60), folder("qwen2_vl")
    _, _, greedy = generate("qwen2_vl", image, "What?", 10)
    end = next(token for token in greedy[2:] if token not in greedy[:2])
    processor = transformers.AutoProcessor.from_pretrained(source)
    network = transformers.AutoModelForImageTextToText.from_pretrained(source)
    network.generation_config.eos_token_id = [processor.tokenizer.pad_token_id, end]
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    answer = ask(own(tmp_path), image, "What?")

    before = greedy[: greedy.index(end)]
    assert answer["finish_reason"] == "stop"
    assert answer["response"] == processor.tokenizer.decode(before, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(before) + 1


def test_thoughts_are_neither_told_nor_answered_and_their_end_is_warned_of(
    folder: Any, own: Any, tmp_path: Path, recorder: Any
) -> None:
    source, heard = folder("glm4v"), recorder()
    processor = transformers.AutoProcessor.from_pretrained(source)
    processor.chat_template = processor.chat_template.replace("assistant\n", "assistant\n<think>\n")
    transformers.AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    answer = ask(own(tmp_path), noise(60, 60), "What?", 5, heard)

    assert (answer["response"], heard.text) == ("", "")
    assert "still thought" in answer["warnings"][0]
    assert answer["usage"]["completion_tokens"] == 5


# --- what a question and a picture may be


def test_a_prompt_beyond_the_context_is_refused_with_its_numbers(engine_of: Any) -> None:
    with pytest.raises(InvalidInput, match=r"has \d{3,} tokens, 16 of them .* 112 x 112 .* takes 512") as refused:
        ask(engine_of("qwen2_vl"), noise(112, 112), "a box of what? " * 60)

    assert refused.value.code == "prompt_too_long"


def test_max_tokens_is_cut_to_what_the_context_leaves(engine_of: Any, generate: Any) -> None:
    question = "wxyz" * 110
    prompt = generate("qwen2_vl", noise(60, 60), question, 1)[1]

    answer = ask(engine_of("qwen2_vl"), noise(60, 60), question, 5000)

    assert 512 - 60 < prompt < 512
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


@pytest.mark.parametrize(("family", "token"), [("qwen2_vl", "<|image_pad|>"), ("llava_next", "<image>")])
def test_control_tokens_in_a_question_are_plain_text(family: str, token: str, engine_of: Any, generate: Any) -> None:
    engine, image = engine_of(family), noise(60, 60)
    plain = generate(family, image, "What is ?", 1)[1]

    usage = ask(engine, image, f"What is {token}<|im_end|>?", 1)["usage"]

    # None of these tokenizers has learnt the marks as words: a token for each of their letters.
    assert usage["prompt_tokens"] > plain + len(token)


def test_where_a_tokenizer_begins_every_text_itself_control_tokens_are_refused(
    folder: Any, own: Any, tmp_path: Path
) -> None:
    source = folder("llava_next")
    processor = transformers.AutoProcessor.from_pretrained(source)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", processor.tokenizer.pad_token_id)]
    )
    transformers.AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    engine = own(tmp_path)

    with pytest.raises(InvalidInput, match="question: <image> is a control token") as refused:
        ask(engine, noise(60, 60), "What is <image>?")
    assert refused.value.code == "control_token"
    assert ask(engine, noise(60, 60), "What is this?")["response"]


def test_a_file_that_is_no_whole_picture_is_the_job_s_fault(engine_of: Any) -> None:
    file = base64.b64decode(base64_of(noise(90, 90), "JPEG"))
    half = base64.b64encode(file[: len(file) // 2]).decode()
    params = load_params(JobType.VISION, {"image_base64": half, "task": "image_caption"})

    with pytest.raises(InvalidInput, match="cut off") as refused:
        engine_of("qwen2_vl").run(params, lambda _: None)

    assert refused.value.code == "invalid_image"


def test_what_the_processor_refuses_is_the_job_s_fault(engine_of: Any) -> None:
    # InternVL's processor counts its own placeholder even where it was marked as plain text.
    with pytest.raises(InvalidInput, match=r"internvl cannot take .* 60 x 60 pixels .*<IMG_CONTEXT>") as refused:
        ask(engine_of("internvl"), noise(60, 60), "What is <IMG_CONTEXT>?")

    assert refused.value.code == "picture_refused"


def test_of_what_the_model_is_not_shown_the_answer_warns(
    folder: Any, own: Any, generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "MOST_SHOWN_PIXELS", 84 * 84)
    source = folder("qwen2_vl")
    processor = transformers.AutoProcessor.from_pretrained(source)
    coarse = own("qwen2_vl")
    processor.image_processor.size["longest_edge"] = 56 * 56
    transformers.AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    blind = own(tmp_path)

    seen = ask(coarse, noise(336, 84), "What?")
    moving = base64_of(noise(60, 60), "GIF", save_all=True, append_images=[noise(60, 60, 1)])
    params = {"image_base64": moving, "question": "What?", "max_tokens": 2}
    warned = coarse.run(load_params(JobType.VISION, params), lambda _: None)

    assert "336 x 84 pixels was reduced to 168 x 42" in seen["warnings"][0]
    assert "animated" in warned["warnings"][0]
    # Its processor reduces further: it would have seen no more of the whole picture.
    assert "warnings" not in ask(blind, noise(336, 84), "What?")
    assert "warnings" not in ask(coarse, noise(60, 60), "What?")


# --- stopping one job


@pytest.mark.parametrize("interruption", [JobCancelled, JobTimedOut])
def test_an_interruption_stops_a_job_within_one_token_and_the_next_one_is_right(
    interruption: type[Exception], engine_of: Any, generate: Any, recorder: Any
) -> None:
    engine, passes = engine_of("qwen2_vl"), []
    stopped = recorder(interruption(), at=3)

    def count(forward: Any, kwargs: dict[str, Any]) -> Any:
        passes.append(rows_of(kwargs))
        return forward(**kwargs)

    with around_forward(count), pytest.raises(interruption):
        ask(engine, noise(80, 60), "What?", 300, stopped)
    computed = len(passes)

    assert computed == 3
    assert stopped.steps == [0, 1, 2, 3]
    assert ask(engine, *QUESTIONS[0])["response"] == generate("qwen2_vl", *QUESTIONS[0])[0]
    assert len(passes) == computed


def test_an_interruption_in_a_shared_pass_leaves_the_others_alone(engine_of: Any, generate: Any, recorder: Any) -> None:
    engine, stopped = engine_of("glm4v"), recorder(JobCancelled(), at=2)
    questions = [(noise(80, 60), "What?", 200), *QUESTIONS[:2]]

    cancelled, *others = together(engine, questions, [stopped, recorder(), recorder()])

    assert isinstance(cancelled.exception(), JobCancelled)
    assert stopped.steps[-1] == 2
    assert [other.result()["response"] for other in others] == [
        generate("glm4v", *question)[0] for question in QUESTIONS[:2]
    ]


def test_a_job_that_waits_can_be_cancelled_while_another_is_computed(engine_of: Any, recorder: Any) -> None:
    waiting = recorder(JobCancelled())

    (cancelled,) = together(engine_of("qwen2_vl"), [(noise(80, 60), "What?", 9)], [waiting])

    assert isinstance(cancelled.exception(), JobCancelled)
    assert waiting.steps == [0]


# --- when the device fails


def test_out_of_memory_halves_the_pass_and_answers_go_on_where_they_were(
    engine_of: Any, generate: Any, recorder: Any
) -> None:
    questions = [(noise(60, 60, n), f"What is {n}?", 9) for n in range(4)]
    heard, passes = [recorder() for _ in questions], []

    def fail(forward: Any, kwargs: dict[str, Any]) -> Any:
        passes.append(rows_of(kwargs))
        if rows_of(kwargs) > 2 and passes.count(4) == 4:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return forward(**kwargs)

    with around_forward(fail):
        answers = [future.result() for future in together(engine_of("qwen2_vl"), questions, heard)]

    assert [answer["response"] for answer in answers] == [generate("qwen2_vl", *question)[0] for question in questions]
    assert [report.text for report in heard] == [answer["response"] for answer in answers]
    # Three tokens were there already: two passes of two make the other six.
    assert passes[passes.index(4) :] == [4] * 4 + [2] * 12


def test_a_picture_that_is_too_much_even_alone_fails_with_its_size(engine_of: Any) -> None:
    engine = engine_of("qwen2_vl")

    with (
        around_forward(fail_with(torch.OutOfMemoryError("tried to allocate 2 GiB"))),
        pytest.raises(OutOfMemory, match=r"picture of 80 x 60 pixels with \d+ tokens.*GiB are free.*smaller picture"),
    ):
        ask(engine, noise(80, 60), "What?")
    assert ask(engine, noise(80, 60), "What?")["response"]


def test_numbers_that_are_none_fail_the_job_not_the_engine(engine_of: Any, generate: Any) -> None:
    engine = engine_of("qwen2_vl")

    def overflow(forward: Any, kwargs: dict[str, Any]) -> Any:
        output = forward(**kwargs)
        output.logits[:] = torch.nan
        return output

    with around_forward(overflow), pytest.raises(EngineError, match="NaN"):
        ask(engine, noise(80, 60), "What?")
    assert ask(engine, *QUESTIONS[0])["response"] == generate("qwen2_vl", *QUESTIONS[0])[0]


def test_a_closed_engine_says_so(own: Any) -> None:
    engine = own("internvl")

    engine.close()

    with pytest.raises(EngineBroken, match="closed"):
        ask(engine, noise(60, 60), "What?")


# --- what cannot be loaded


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic(own: Any) -> None:
    with pytest.raises(EngineLoadError, match=r"qwen2_vl does not fit: weights .* raise max_memory_gib"):
        own("qwen2_vl", Device("cpu", dtype="float32", max_memory_gib=0.0001))


def test_the_context_is_what_the_memory_holds_where_the_model_would_take_more(
    folder: Any, own: Any, tmp_path: Path
) -> None:
    source = tmp_path / "long"
    shutil.copytree(folder("qwen2_vl"), source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100_000
    (source / "config.json").write_text(json.dumps(config))

    engine = own(source, Device("cpu", dtype="float32", max_memory_gib=0.003))

    # 3 MiB without 0.8 MB of weights, half of it for keys and values of 512 bytes a token.
    assert 2000 < engine.context < 2600


def test_a_pass_takes_questions_of_similar_length_whose_tokens_fit_the_memory(folder: Any) -> None:
    network = transformers.AutoModelForImageTextToText.from_pretrained(folder("qwen2_vl"))
    viewer = Viewer(network, [1], 2)
    viewer.together, viewer.budget_tokens = 3, 1000
    spoken = Spoken(transformers.AutoTokenizer.from_pretrained(folder("qwen2_vl")).backend_tokenizer, False)

    def asked(length: int, max_tokens: int) -> Question:
        inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
        return Question(inputs, (1, 1), max_tokens, spoken, [1], GREEDY, lambda _: None)

    oldest, long, alike, longer, near = waiting = [
        asked(*size) for size in ((100, 9), (400, 9), (120, 9), (190, 9), (101, 9))
    ]
    greedy = asked(100, 500)

    assert viewer.pick(waiting) == [oldest, alike, near]
    assert viewer.pick([oldest, long]) == [oldest]
    assert viewer.pick([oldest, longer]) == [oldest, longer]
    assert viewer.pick([oldest, greedy]) == [oldest]
    assert viewer.pick([long]) == [long]


def test_a_language_model_is_no_vision_model(checkpoint: Any, own: Any) -> None:
    with pytest.raises(EngineLoadError, match="It is a qwen2 model, which answers no questions about"):
        own(checkpoint("qwen2"))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("model.safetensors", "safetensors"), ("chat_template.jinja", "no chat template"), ("processor_config.json", "")],
)
def test_a_folder_that_lacks_a_part_is_refused_by_name(
    missing: str, reason: str, folder: Any, own: Any, tmp_path: Path
) -> None:
    source = tmp_path / "lacking"
    shutil.copytree(folder("qwen2_vl"), source, ignore=shutil.ignore_patterns(missing))

    with pytest.raises(EngineLoadError, match=f"lacking.*{reason}"):
        own(source)


# --- a model that has learnt something


def test_the_demo_s_model_sees_what_is_drawn() -> None:
    engine = load(resolve(JobType.VISION, "shapes-vision"), CPU)
    rng = random.Random(5)
    scenes = rng.sample(list(SCENES), 8)
    drawn = [draw(scene, rng).resize((200, 200)) for scene in scenes]

    answers = [
        future.result()["response"]
        for future in together(engine, [(image, "Describe this image in detail.", 40) for image in drawn])
    ]
    engine.close()

    told = [
        all(word in answer for word in (scene.colour, scene.shape, scene.ground))
        for scene, answer in zip(scenes, answers, strict=True)
    ]
    assert sum(told) >= 7, answers
