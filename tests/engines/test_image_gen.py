import base64
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from engines.catalogue import DEFAULT_ON_CPU, MODELS, Drawing, Guidance, JobType, Model, find
from engines.contract import (
    Device,
    EngineError,
    EngineLoadError,
    InvalidInput,
    JobCancelled,
    JobTimedOut,
    OutOfMemory,
    Progress,
)
from engines.image_gen import pipelines
from engines.image_gen.engine import Engine
from engines.image_gen.pipelines import Place, Sizes, choose_place, component_bytes, put
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from tests.engines.tiny_image_gen import FAMILIES, LATENTS, SCALE, TILE, build

GIB = 2**30
CPU = Device("cpu", dtype="float32")
PROMPT = "a red circle"
ROWS = {
    "z_image": "Tongyi-MAI/Z-Image-Turbo",
    "schnell": "black-forest-labs/FLUX.1-schnell",
    "dev": "black-forest-labs/FLUX.1-dev",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
}
#: What computes a step, by family.
NETWORKS = {
    "z_image": diffusers.ZImageTransformer2DModel,
    "schnell": diffusers.FluxTransformer2DModel,
    "dev": diffusers.FluxTransformer2DModel,
    "sdxl": diffusers.UNet2DConditionModel,
    "sd3": diffusers.SD3Transformer2DModel,
}
#: Steps of the tests' pictures.
STEPS = 2
#: Size of a picture that others wait behind.
BLOCKER = {"width": 96, "height": 112}


def drawing_of(family: str) -> Drawing:
    """The catalogue's, for pictures as small as the tests'."""
    drawing = find(JobType.IMAGE_GEN, ROWS[family]).drawing
    assert drawing
    return replace(drawing, steps=STEPS, side=64, side_step=16, least_side=64, most_side=192)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline."""
    return cache(lambda family: build(family, tmp_path_factory.mktemp("tiny") / family))


@pytest.fixture(scope="session")
def model_of(folder_of: Any) -> Callable[[str], Model]:
    return lambda family: replace(resolve(JobType.IMAGE_GEN, str(folder_of(family))), drawing=drawing_of(family))


@pytest.fixture(scope="session")
def engine_of(model_of: Any) -> Iterator[Callable[[str], Engine]]:
    """The engine of a family, loaded once."""
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = load(model_of(family), CPU)
        return loaded[family]

    yield get
    for engine in loaded.values():
        engine.close()


@pytest.fixture(scope="session")
def directly(folder_of: Any) -> Callable[..., Any]:
    """A picture of diffusers' own pipeline, called once and alone."""

    @cache
    def pipeline(family: str) -> Any:
        loaded = diffusers.DiffusionPipeline.from_pretrained(folder_of(family), dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    def draw(family: str, seed: int, guidance_scale: float, **options: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        size = {"width": 64, "height": 64, "num_inference_steps": STEPS}
        if tokens := drawing_of(family).prompt_tokens:
            options = {"max_sequence_length": tokens, **options}
        arguments = {"prompt": PROMPT, **size, "guidance_scale": guidance_scale, "generator": generator, **options}
        return np.asarray(pipeline(family)(**arguments).images[0])

    return draw


def ask(engine: Any, report: Any = lambda _: None, **params: Any) -> dict[str, Any]:
    result: dict[str, Any] = engine.run(load_params(JobType.IMAGE_GEN, {"prompt": PROMPT, **params}), report)
    assert RESULTS[JobType.IMAGE_GEN].validate(result) == {}
    return result


def pixels(result: dict[str, Any]) -> Any:
    """Of a result's picture: uint8, shape (height, width, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(result["image_base64"]))) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (result["width"], result["height"]))
        return np.asarray(picture)


def apart(one: Any, other: Any) -> int:
    """The largest difference of a channel, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def ask_together(engine: Any, *asked: dict[str, Any], reports: Any = ()) -> list[Any]:
    """Futures of jobs that all waited when their turn came: behind a picture that is cancelled once they do."""
    seen: set[int] = set()
    started = threading.Event()

    def first(event: Any) -> None:
        if event.done:
            started.set()
            if len(seen) == len(asked):
                raise JobCancelled

    def behind(number: int) -> Callable[[Any], None]:
        def report(event: Any) -> None:
            seen.add(number)
            if reports:
                reports[number](event)

        return report

    with ThreadPoolExecutor(len(asked) + 1) as pool:
        blocker = pool.submit(ask, engine, first, steps=150, **BLOCKER)
        assert started.wait(20)
        futures = [pool.submit(ask, engine, behind(number), **params) for number, params in enumerate(asked)]
    assert isinstance(blocker.exception(), JobCancelled)
    return futures


@contextmanager
def watching(
    kind: type, act: Callable[[Any], None] = lambda _: None, change: Callable[[Any], Any] = lambda out: out
) -> Iterator[list[int]]:
    """How many pictures each forward pass of a network was over, but for those that others wait behind.

    act: called with what goes in, before; it may raise. change: makes what comes out.
    """
    original, passes = kind.forward, []
    blocker = LATENTS * BLOCKER["width"] * BLOCKER["height"] // SCALE**2

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        into = args[0] if args else kwargs["hidden_states"]
        if into[0].numel() != blocker:
            passes.append(len(into))
            act(into)
        return change(original(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", forward)
        yield passes


def out_of_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


# --- the same picture as diffusers draws


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_that_of_the_pipeline_at_the_guidance_of_its_catalogue_row(
    family: str, engine_of: Any, directly: Any
) -> None:
    scale = drawing_of(family).guidance_scale

    result = ask(engine_of(family), seed=7)

    assert (result["seed"], result["steps"], result["guidance_scale"]) == (7, STEPS, scale)
    assert (result["format"], result["model"]) == ("png", family)
    assert "warnings" not in result
    assert np.array_equal(pixels(result), directly(family, 7, scale))


@pytest.mark.parametrize(("family", "rows"), [("z_image", 1), ("schnell", 1), ("dev", 1), ("sdxl", 2), ("sd3", 2)])
def test_a_second_pass_without_the_prompt_is_computed_only_where_guidance_asks_for_it(
    family: str, rows: int, engine_of: Any
) -> None:
    engine = engine_of(family)

    with watching(NETWORKS[family]) as passes:
        ask(engine)

    assert passes == [rows] * STEPS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_row_is_drawn_as_its_class_and_configuration_say(family: str, folder_of: Any) -> None:
    loaded = pipelines.load(resolve(JobType.IMAGE_GEN, str(folder_of(family))), CPU)

    assert loaded.drawing == find(JobType.IMAGE_GEN, ROWS[family]).drawing


def test_width_height_steps_and_guidance_are_those_of_the_job(engine_of: Any, directly: Any) -> None:
    given = {"width": 96, "height": 64, "guidance_scale": 3.0}

    result = ask(engine_of("sdxl"), seed=1, steps=3, **given)

    assert (result["width"], result["height"], result["steps"], result["guidance_scale"]) == (96, 64, 3, 3.0)
    assert np.array_equal(pixels(result), directly("sdxl", 1, num_inference_steps=3, **given))


# --- guidance


@pytest.mark.parametrize(("family", "scale"), [("sdxl", 6.0), ("sd3", 7.0), ("z_image", 0.5)])
def test_a_negative_prompt_acts_under_classifier_free_guidance(
    family: str, scale: float, engine_of: Any, directly: Any
) -> None:
    engine = engine_of(family)

    without = ask(engine, seed=3, guidance_scale=scale)
    result = ask(engine, seed=3, guidance_scale=scale, negative_prompt="blurry, ugly")

    assert "warnings" not in result
    assert not np.array_equal(pixels(result), pixels(without))
    assert np.array_equal(pixels(result), directly(family, 3, scale, negative_prompt="blurry, ugly"))


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        ("z_image", {}, "only above 0"),
        ("schnell", {}, "does not read it."),
        ("dev", {}, "does not read it."),
        ("sdxl", {"guidance_scale": 1.0}, "only above 1"),
    ],
)
def test_a_negative_prompt_that_cannot_act_is_ignored_with_a_warning(
    family: str, given: Any, words: str, engine_of: Any
) -> None:
    engine = engine_of(family)

    with watching(NETWORKS[family]) as passes:
        result = ask(engine, seed=3, negative_prompt="blurry, ugly", **given)

    (warning,) = result["warnings"]
    assert warning.startswith("negative_prompt was ignored")
    assert words in warning
    assert passes == [1] * STEPS
    assert np.array_equal(pixels(result), pixels(ask(engine, seed=3, **given)))


def test_a_guidance_scale_is_an_input_of_dev_and_means_nothing_to_schnell(engine_of: Any, directly: Any) -> None:
    dev = ask(engine_of("dev"), seed=2, guidance_scale=9.0)
    schnell = ask(engine_of("schnell"), seed=2, guidance_scale=9.0)

    assert np.array_equal(pixels(dev), directly("dev", 2, 9.0))
    assert apart(pixels(dev), directly("dev", 2, 3.5)) > 1
    assert schnell["guidance_scale"] == 0
    assert schnell["warnings"] == ["guidance_scale was ignored: schnell draws without guidance."]
    assert np.array_equal(pixels(schnell), directly("schnell", 2, 0.0))


def test_a_model_without_guidance_gets_none_even_from_a_pipeline_that_knows_it(model_of: Any) -> None:
    model = model_of("z_image")
    engine = load(replace(model, drawing=replace(model.drawing, guidance=Guidance.NONE, guidance_scale=5.0)), CPU)

    with watching(NETWORKS["z_image"]) as passes:
        result = ask(engine)
    engine.close()

    assert passes == [1] * STEPS
    assert result["guidance_scale"] == 0


# --- sizes


@pytest.mark.parametrize(
    ("field", "value"), [("width", 72), ("height", 72), ("width", 208), ("height", 1024), ("height", 48)]
)
def test_a_size_that_the_model_cannot_draw_is_refused_with_its_rule(field: str, value: int, engine_of: Any) -> None:
    params = load_params(JobType.IMAGE_GEN, {"prompt": PROMPT})

    with pytest.raises(InvalidInput) as refused:
        engine_of("sdxl").run({**params, field: value}, lambda _: None)

    assert refused.value.code == "invalid_size"
    assert refused.value.message == f"{field} must be a multiple of 16 from 64 to 192 for sdxl."


def test_a_model_of_one_size_draws_that_and_the_picture_is_resized_with_a_warning(model_of: Any, directly: Any) -> None:
    model = model_of("z_image")
    engine = load(replace(model, drawing=replace(model.drawing, one_size=True)), CPU)

    own, asked = ask(engine, seed=5), ask(engine, seed=5, width=128, height=96)
    engine.close()

    drawn = directly("z_image", 5, 0.0)
    assert "warnings" not in own
    assert np.array_equal(pixels(own), drawn)
    assert asked["warnings"] == ["z_image draws pictures of 64 x 64 only: this one was resized to 128 x 96."]
    resized = Image.fromarray(drawn).resize((128, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(asked), np.asarray(resized))


# --- seeds and batches


def test_the_seed_is_returned_and_draws_the_same_picture_again(engine_of: Any) -> None:
    engine = engine_of("sd3")

    first, other = ask(engine), ask(engine)
    again = ask(engine, seed=first["seed"])

    assert 0 <= first["seed"] < 2**32
    assert first["seed"] != other["seed"]
    assert again == first
    assert again["image_base64"] != other["image_base64"]
    assert ask(engine, seed=2**53 - 1)["seed"] == 2**53 - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_drawn_together_are_those_drawn_alone(family: str, engine_of: Any) -> None:
    engine = engine_of(family)
    asked = [{"seed": seed, "prompt": f"a red circle {'and a fox ' * seed}"} for seed in range(3)]
    rows = 2 if family in ("sdxl", "sd3") else 1

    with watching(NETWORKS[family]) as passes:
        together = [future.result() for future in ask_together(engine, *asked)]
    alone = [ask(engine, **params) for params in asked]

    assert passes == [3 * rows] * STEPS
    # Sums of a batch are added up in another order: equal but for the last bits of a float, so nearly always here too.
    assert max(apart(pixels(one), pixels(other)) for one, other in zip(together, alone, strict=True)) <= 1
    assert apart(pixels(alone[0]), pixels(alone[1])) > 8


def test_only_pictures_of_equal_size_steps_guidance_and_kind_share_a_pass(engine_of: Any) -> None:
    engine = engine_of("sdxl")
    negative = {"negative_prompt": "ugly"}
    asked = [{}, {"width": 80}, {"steps": 3}, {"guidance_scale": 2.0}, negative, {}, negative]

    with watching(NETWORKS["sdxl"]) as passes:
        futures = ask_together(engine, *({"seed": 1, **params} for params in asked))

    assert all(future.result() for future in futures)
    assert passes == [4, 4, 2, 2, 2, 2, 2, 2, 2, 4, 4]


def test_as_many_pictures_are_drawn_together_as_are_small_enough(engine_of: Any) -> None:
    engine = engine_of("schnell")

    with watching(NETWORKS["schnell"]) as small:
        done = ask_together(engine, *({"seed": seed} for seed in range(6)))
    with watching(NETWORKS["schnell"]) as large:
        done += ask_together(engine, *({"seed": seed, "width": 176, "height": 176} for seed in range(3)))

    assert all(future.result() for future in done)
    assert small == [4] * STEPS + [2] * STEPS
    assert large == [2] * STEPS + [1] * STEPS
    assert engine.slots == 8


# --- progress and stopping


def test_progress_climbs_step_by_step(engine_of: Any, recorder: Any) -> None:
    heard = recorder()

    ask(engine_of("z_image"), heard, steps=5)

    assert heard.heard == [Progress(0, None, "step"), *(Progress(done, 5, "step") for done in range(1, 6))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cancelled_picture_stops_within_one_step_and_the_next_one_is_right(
    family: str, engine_of: Any, directly: Any, recorder: Any
) -> None:
    engine = engine_of(family)

    with watching(NETWORKS[family]) as passes, pytest.raises(JobCancelled):
        ask(engine, recorder(JobCancelled(), at=2), steps=50)
    after = ask(engine, seed=4)

    assert len(passes) == 2
    assert np.array_equal(pixels(after), directly(family, 4, drawing_of(family).guidance_scale))


def test_a_job_that_stops_does_not_stop_those_it_is_drawn_with(engine_of: Any, directly: Any, recorder: Any) -> None:
    engine = engine_of("schnell")
    stopped = recorder(JobTimedOut(), at=1)

    futures = ask_together(engine, {"seed": 1}, {"seed": 2}, reports=[stopped, recorder()])

    assert isinstance(futures[0].exception(), JobTimedOut)
    assert stopped.steps[-1] == 1
    assert apart(pixels(futures[1].result()), directly("schnell", 2, 0.0)) <= 1


# --- when memory runs out


def test_pictures_that_do_not_fit_together_are_drawn_in_smaller_passes(engine_of: Any, directly: Any) -> None:
    engine = engine_of("dev")

    def limit(into: Any) -> None:
        if len(into) > 1:
            out_of_memory(into)

    with watching(NETWORKS["dev"], limit) as passes:
        futures = ask_together(engine, *({"seed": seed} for seed in range(4)))
        results = [future.result() for future in futures]

    assert passes == [4, 2, *[1] * 4 * STEPS]
    assert all(np.array_equal(pixels(result), directly("dev", result["seed"], 3.5)) for result in results)


def test_a_picture_that_does_not_fit_alone_fails_with_numbers_and_the_next_is_drawn(model_of: Any) -> None:
    engine = load(model_of("schnell"), CPU)

    with (
        watching(NETWORKS["schnell"], out_of_memory),
        pytest.raises(OutOfMemory, match=r"A picture of 64 x 96 of schnell.*GiB are free.*2 GiB.*smaller width"),
    ):
        ask(engine, width=64, height=96)
    assert ask(engine)["image_base64"]
    engine.close()


def test_a_picture_that_cannot_be_decoded_at_once_is_decoded_in_tiles(
    model_of: Any, directly: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(model_of("sdxl"), CPU)
    decoder = diffusers.models.autoencoders.vae.Decoder

    def limit(into: Any) -> None:
        if max(into.shape) > TILE // 2:
            out_of_memory(into)

    with watching(decoder, limit):
        result = ask(engine, seed=1, steps=1, width=128, height=96)
    engine.close()

    assert "in tiles" in caplog.text
    # Tiles are blended where they meet.
    whole = directly("sdxl", 1, 6.0, num_inference_steps=1, width=128, height=96)
    assert np.abs(pixels(result).astype(int) - whole).mean() < 16


def test_sdxl_in_float16_draws_on_after_it_failed_while_decoding_in_float32(model_of: Any) -> None:
    model = model_of("sdxl")
    small = replace(model.drawing, side=32, least_side=32)
    engine = load(replace(model, drawing=small), Device("cpu", dtype="float16"))
    before = ask(engine, seed=1, steps=1)

    def fail(_: Any) -> None:
        raise ValueError("no")

    with watching(diffusers.models.autoencoders.vae.Decoder, fail), pytest.raises(EngineError, match="no"):
        ask(engine, steps=1)
    after = ask(engine, seed=1, steps=1)
    engine.close()

    assert after == before


# --- pictures of no numbers


def not_a_number(out: Any) -> Any:
    return out * float("nan")


def test_a_picture_that_is_not_a_number_fails_instead_of_being_black(engine_of: Any) -> None:
    engine = engine_of("sdxl")

    with (
        watching(diffusers.models.autoencoders.vae.Decoder, change=not_a_number),
        pytest.raises(EngineError, match="Set dtype to bfloat16 or float32") as failed,
    ):
        ask(engine)

    assert failed.value.code == "not_a_number"
    assert ask(engine)["image_base64"]


def test_a_model_that_draws_no_numbers_is_not_loaded(model_of: Any) -> None:
    with (
        watching(diffusers.models.autoencoders.vae.Decoder, change=not_a_number),
        pytest.raises(EngineLoadError, match="sd3 drew a picture that is not a number"),
    ):
        load(model_of("sd3"), CPU)


@pytest.mark.parametrize("family", ["z_image", "schnell"])
def test_families_of_bfloat16_are_never_computed_in_float16(
    family: str, model_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineLoadError, match="overflows in float16"):
        load(model_of(family), Device("cpu", dtype="float16"))

    monkeypatch.setattr(pipelines, "pick_dtype", lambda _: "float16")
    loaded = pipelines.load(model_of(family), Device("cpu"))

    assert loaded.dtype is loaded.pipeline.transformer.dtype is torch.float32


# --- prompts that are too long


@pytest.mark.parametrize(
    ("family", "fits", "too_long", "most"),
    [
        ("sdxl", 60, 90, 77),
        ("sd3", 100, 300, 256),
        ("schnell", 100, 300, 256),
        ("dev", 200, 600, 512),
        # 510 alone: what the chat template puts around it makes it too long.
        ("z_image", 200, 510, 512),
    ],
)
def test_a_prompt_past_what_the_model_reads_is_cut_with_a_warning_and_never_logged(
    family: str, fits: int, too_long: int, most: int, engine_of: Any, capfd: Any, caplog: Any
) -> None:
    engine = engine_of(family)

    short = ask(engine, prompt="q" * fits, steps=1)
    result = ask(engine, prompt="q" * too_long, steps=1)

    assert "warnings" not in short
    (warning,) = result["warnings"]
    assert warning.startswith(f"The prompt was cut: {family} reads {most} tokens of its ")
    assert int(warning.rstrip(".").rpartition(" ")[2]) > most
    printed = capfd.readouterr()
    assert "qqq" not in printed.out + printed.err + caplog.text


def test_a_negative_prompt_that_is_cut_is_said_too(engine_of: Any) -> None:
    (warning,) = ask(engine_of("sdxl"), negative_prompt="q" * 100)["warnings"]

    assert warning.startswith("The negative_prompt was cut: sdxl reads 77 tokens")


# --- what fits where


def test_weights_are_counted_by_component_in_the_dtype_they_are_loaded_in_and_once(
    folder_of: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "sdxl")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    networks = {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}

    counted = component_bytes(folder, index, torch.bfloat16)

    assert counted == {name: 2 * sum(weight.numel() for weight in part.parameters()) for name, part in networks.items()}


def test_the_place_of_the_weights_follows_what_is_free() -> None:
    # Z-Image-Turbo in bfloat16.
    sizes = Sizes({"transformer": int(11.5 * GIB), "text_encoder": int(7.5 * GIB), "vae": GIB // 6}, 2048, 1024)
    card, offloading = Device("cuda:0"), Device("cuda:0", offload=True)

    places = [choose_place("Z", sizes, offloading, free * GIB, host=64 * GIB) for free in (24, 16, 8)]

    assert places == [Place.DEVICE, Place.COMPONENTS, Place.LAYERS]
    assert choose_place("Z", sizes, card, 24 * GIB, host=8 * GIB) is Place.DEVICE
    with pytest.raises(EngineLoadError) as refused:
        choose_place("Z", sizes, card, 16 * GIB, host=64 * GIB)
    assert refused.value.message == (
        "Z does not fit: weights 19.17 GiB + a picture of 1024 x 1024 2.00 GiB + 10 % = 23.28 GiB; free: 16.00 GiB on "
        "cuda:0. To go on: choose a smaller model or enable offloading to host memory (slow)."
    )
    with pytest.raises(EngineLoadError, match=r"16\.00 GiB on cuda:0, 12\.00 GiB on the host"):
        choose_place("Z", sizes, offloading, 16 * GIB, host=12 * GIB)


def test_a_pipeline_that_does_not_fit_is_refused_before_its_weights_are_read(folder_of: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "large")
    (folder / "unet/config.json").unlink()

    with pytest.raises(EngineLoadError, match=r"large does not fit.*max_memory_gib=0\.0005.*raise max_memory_gib"):
        load(resolve(JobType.IMAGE_GEN, str(folder)), Device("cpu", dtype="float32", max_memory_gib=0.0005))
    with pytest.raises(EngineLoadError, match="large cannot be loaded"):
        load(resolve(JobType.IMAGE_GEN, str(folder)), CPU)


@pytest.mark.parametrize("place", [Place.COMPONENTS, Place.LAYERS])
@pytest.mark.parametrize("family", ["z_image", "dev", "sdxl"])
def test_weights_in_host_memory_draw_the_same_picture(family: str, place: Place, folder_of: Any, directly: Any) -> None:
    expected = directly(family, 1, 2.0)
    # As in the engine thread.
    with torch.inference_mode():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder_of(family), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        put(pipeline, place, "cpu")

        size = {"width": 64, "height": 64, "num_inference_steps": STEPS}
        generator = torch.Generator("cpu").manual_seed(1)
        picture = pipeline(PROMPT, **size, guidance_scale=2.0, generator=generator).images[0]

    assert pipeline.vae.use_tiling
    assert np.array_equal(np.asarray(picture), expected)


# --- what cannot be loaded


def changed(folder: Path, **entries: Any) -> Model:
    """The model of a folder whose model_index.json says something else."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))
    return resolve(JobType.IMAGE_GEN, str(folder))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "draws no pictures from texts"),
        ("AudioLDM2Pipeline", "FluxPipeline, StableDiffusion3Pipeline"),
        ("PixArtSigmaPipeline", "takes no callback_on_step_end"),
        ("QwenImagePipeline", "Give it a row"),
        (["pipeline", "MyPipeline"], "needs code of its own"),
    ],
)
def test_a_pipeline_that_draws_no_pictures_from_texts_is_refused(
    kind: Any, words: str, folder_of: Any, tmp_path: Path
) -> None:
    model = changed(shutil.copytree(folder_of("sdxl"), tmp_path / "odd"), _class_name=kind)

    with pytest.raises(EngineLoadError, match=words):
        load(model, CPU)


def test_code_in_a_folder_is_never_run(folder_of: Any, tmp_path: Path) -> None:
    folder, trace = shutil.copytree(folder_of("sdxl"), tmp_path / "odd"), tmp_path / "it ran"
    code = f"open({str(trace)!r}, 'w')\nfrom diffusers import UNet2DConditionModel as Net\n"
    (folder / "unet/net.py").write_text(code)
    (folder / "net.py").write_text(code)

    with pytest.raises(EngineLoadError, match="odd cannot be loaded"):
        load(changed(folder, unet=["net", "Net"]), CPU)

    assert not trace.exists()


def test_weights_that_are_not_safetensors_are_refused(folder_of: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("sdxl"), tmp_path / "odd")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    with pytest.raises(EngineLoadError, match=r"odd cannot be loaded.*\*\.safetensors"):
        load(resolve(JobType.IMAGE_GEN, str(folder)), CPU)


def test_a_folder_without_a_pipeline_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"must hold.*model_index\.json"):
        load(resolve(JobType.IMAGE_GEN, str(tmp_path)), CPU)


def test_a_row_whose_folder_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"shapes-picture cannot be loaded: there is no folder .*nowhere"):
        load(replace(find(JobType.IMAGE_GEN, "shapes-picture"), folder=str(tmp_path / "nowhere")), CPU)


def test_a_hub_that_cannot_be_reached_or_asks_for_terms_names_the_ways_out() -> None:
    # conftest sets HF_HUB_OFFLINE: nothing is asked, nothing is cached.
    with pytest.raises(EngineLoadError, match=r"HF_ENDPOINT.*local folder"):
        load(resolve(JobType.IMAGE_GEN, ROWS["z_image"]), CPU)
    with pytest.raises(EngineLoadError, match=r"accept its terms at .*FLUX.1-dev and set HF_TOKEN"):
        load(resolve(JobType.IMAGE_GEN, ROWS["dev"]), CPU)


def test_every_picture_model_of_the_catalogue_says_how_it_draws() -> None:
    rows = [model for model in MODELS if model.type is JobType.IMAGE_GEN and model.on_device]

    assert DEFAULT_ON_CPU[JobType.IMAGE_GEN] in {model.id for model in rows}
    assert all(model.drawing and model.drawing.side % model.drawing.side_step == 0 for model in rows)
