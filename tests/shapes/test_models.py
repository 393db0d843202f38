"""Our own two models, through their engines: the pictures show what was asked, and the answers say what they show."""

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image

from engines.catalogue import JobType
from engines.contract import Device, Engine
from engines.loading import load, resolve
from engines.schemas import load_params
from engines.vision.engine import PROMPTS
from shapes.train_vision import READING
from shapes.world import NO_TEXT, SCENES, Scene, captions, draw, exchanges, judge

torch.set_num_threads(1)
RIGHT = 0.9


@pytest.fixture(scope="module")
def picture() -> Iterator[Engine]:
    engine = load(resolve(JobType.IMAGE_GEN, "shapes-picture"), Device("cpu", dtype="float32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vision() -> Iterator[Engine]:
    engine = load(resolve(JobType.VISION, "shapes-vision"), Device("cpu", dtype="float32"))
    yield engine
    engine.close()


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def opened(result: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(result["image_base64"]))).convert("RGB")


def all_at_once(engine: Engine, job_type: JobType, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(engine.slots) as pool:
        return list(pool.map(lambda params: engine.run(load_params(job_type, params), lambda _: None), asked))


def of_language(texts: list[str], chinese: bool) -> list[str]:
    return [text for text in texts if text.isascii() is not chinese]


def test_the_judge_sees_what_was_drawn() -> None:
    rng = random.Random(0)

    assert all(judge(draw(scene, rng)) == scene for scene in SCENES)


@pytest.mark.parametrize("chinese", [False, True])
def test_pictures_show_the_colour_shape_and_ground_that_were_asked_for(picture: Engine, chinese: bool) -> None:
    rng = random.Random(1)
    scenes = rng.sample(SCENES, 30)
    asked = [
        {"prompt": rng.choice(of_language(captions(scene), chinese)), "seed": seed} for seed, scene in enumerate(scenes)
    ]

    results = all_at_once(picture, JobType.IMAGE_GEN, asked)

    assert {(result["width"], result["height"]) for result in results} == {(64, 64)}
    right = sum(judge(opened(result)) == scene for result, scene in zip(results, scenes, strict=True))
    assert right >= RIGHT * len(scenes)


def test_a_red_circle_is_a_red_circle_of_any_size_and_seed(picture: Engine) -> None:
    asked = [
        {"prompt": prompt, "seed": seed, "width": 256, "height": 256}
        for seed in (3, 4)
        for prompt in ("a red circle", "一个红色的圆形")
    ]

    results = all_at_once(picture, JobType.IMAGE_GEN, asked)

    assert [judge(opened(result)) for result in results] == [Scene("red", "circle", "white")] * 4
    assert all("resized to 256 x 256" in result["warnings"][0] for result in results)


@pytest.mark.parametrize("topic", ["colour", "shape", "ground", "all"])
@pytest.mark.parametrize("chinese", [False, True])
def test_answers_about_fresh_pictures_are_right(vision: Engine, topic: str, chinese: bool) -> None:
    rng = random.Random(2)
    scenes = rng.sample(SCENES, 20)
    pairs = [
        rng.choice([pair for pair in exchanges(scene)[topic] if pair.answer.isascii() is not chinese])
        for scene in scenes
    ]
    asked = [
        {"image_base64": png(draw(scene, rng)), "question": pair.question}
        for scene, pair in zip(scenes, pairs, strict=True)
    ]

    results = all_at_once(vision, JobType.VISION, asked)

    right = sum(result["response"] == pair.answer for result, pair in zip(results, pairs, strict=True))
    assert right >= RIGHT * len(scenes)


def test_what_one_model_drew_the_other_one_names(picture: Engine, vision: Engine) -> None:
    rng = random.Random(3)
    scenes = rng.sample(SCENES, 20)
    drawn = all_at_once(
        picture,
        JobType.IMAGE_GEN,
        [{"prompt": captions(scene)[0], "seed": 9, "width": 256, "height": 256} for scene in scenes],
    )

    answers = all_at_once(
        vision, JobType.VISION, [{"image_base64": one["image_base64"], "task": "image_caption"} for one in drawn]
    )

    wanted = [f" {scene.colour} {scene.shape} on " for scene in scenes]
    right = sum(want in answer["response"] for want, answer in zip(wanted, answers, strict=True))
    assert right >= RIGHT * len(scenes)


def test_the_engines_prompts_are_those_the_vision_model_was_trained_on(vision: Engine) -> None:
    assert PROMPTS["ocr"] in READING
    assert PROMPTS["image_caption"] in [pair.question for pair in exchanges(SCENES[0])["all"]]
    asked = [{"image_base64": png(draw(SCENES[0])), "task": "ocr"}]
    assert all_at_once(vision, JobType.VISION, asked)[0]["response"] == NO_TEXT
