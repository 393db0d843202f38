"""Text-to-image generation with any diffusers pipeline that draws from texts.

One engine thread makes every torch call. Job threads settle what is to be drawn, hand it over and wait; the engine
thread draws pictures of equal size, steps and guidance together (Studio), and the job threads encode them.
"""

import base64
import io
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from engines.catalogue import Drawing, Guidance, Model
from engines.contract import Device, EngineError, EngineLoadError, InvalidInput, Report
from engines.grouped import Grouped
from engines.image_gen.drawing import Picture, Studio
from engines.image_gen.pipelines import load
from engines.thread import EngineThread, Way

logger = logging.getLogger(__name__)

#: Jobs in the engine at least: some wait or encode while others are drawn.
LEAST_SLOTS = 4

#: Seeds that are drawn for jobs without one lie below it: as many as most tools for pictures show.
SEEDS = 2**32

#: Steps of the picture that warms an engine up; with one, some schedulers fail.
WARM_STEPS = 2


class Engine:
    """A text-to-image model."""

    def __init__(self, model: Model, device: Device) -> None:
        self.slots = LEAST_SLOTS
        self._model = model
        self._device = device
        self._drawing: Drawing
        self._thread: EngineThread[Picture] = EngineThread(model.id, device, self._load)

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """An ImageGenResult for ImageGenParams.

        Raises InvalidInput for a size that the model cannot draw, and EngineError for a picture of no numbers.
        """
        width, height = self._side("width", params), self._side("height", params)
        scale, negative_prompt, warnings = self._guidance(params)
        seed = secrets.randbelow(SEEDS) if params["seed"] is None else params["seed"]
        side = self._drawing.side
        drawn = (side, side) if self._drawing.one_size else (width, height)
        steps = params["steps"] or self._drawing.steps
        picture = Picture(params["prompt"], negative_prompt, drawn, steps, scale, seed, report)
        self._thread.submit(picture)
        image = self._image(picture)
        warnings += picture.cuts
        if drawn != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            warnings.append(
                f"{self._model.id} draws pictures of {side} x {side} only: this one was resized to {width} x {height}."
            )
        return {
            "image_base64": _png(image),
            "width": width,
            "height": height,
            "seed": seed,
            "format": "png",
            "steps": steps,
            "guidance_scale": scale,
            "model": self._model.id,
            **({"warnings": warnings} if warnings else {}),
        }

    @property
    def batch(self) -> int:
        """How many jobs are being computed together now."""
        return self._thread.batch

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        self._thread.close()

    def _side(self, name: str, params: Mapping[str, Any]) -> int:
        rules = self._drawing
        side: int = params[name] or rules.side
        if side % rules.side_step or not rules.least_side <= side <= rules.most_side:
            raise InvalidInput(
                f"{name} must be a multiple of {rules.side_step} from {rules.least_side} to {rules.most_side} for "
                f"{self._model.id}.",
                code="invalid_size",
            )
        return side

    def _guidance(self, params: Mapping[str, Any]) -> tuple[float, str, list[str]]:
        """The scale to draw with, the negative prompt as far as it acts, and what of the params does not."""
        rules, name = self._drawing, self._model.id
        given, negative_prompt = params["guidance_scale"], params["negative_prompt"] or ""
        scale = float(rules.guidance_scale if given is None else given)
        warnings = []
        if rules.guidance is Guidance.NONE:
            # Some of these pipelines would take a number for classifier-free guidance; zero turns it off in all.
            scale = 0.0
            if given:
                warnings.append(f"guidance_scale was ignored: {name} draws without guidance.")
        acts = rules.guidance is Guidance.CLASSIFIER_FREE
        if not negative_prompt or (acts and scale > rules.free_above):
            return scale, negative_prompt, warnings
        when = f" at a guidance_scale of {scale:g}, only above {rules.free_above:g}" if acts else ""
        warnings.append(f"negative_prompt was ignored: {name} does not read it{when}.")
        return scale, "", warnings

    def _image(self, picture: Picture) -> Image.Image:
        """What was drawn, in 8 bits a channel. Raises EngineError where the network gave no numbers."""
        assert picture.pixels is not None
        if np.isnan(picture.pixels).any():
            raise EngineError(
                f"{self._model.id} drew a picture that is not a number: the dtype is too narrow for it. Set dtype to "
                "bfloat16 or float32.",
                code="not_a_number",
            )
        return Image.fromarray((picture.pixels * 255).round().astype(np.uint8))

    # From here on: the engine thread.

    def _load(self, between_steps: Callable[[], bool]) -> Way[Picture]:
        loaded = load(self._model, self._device)
        self._drawing = rules = loaded.drawing
        studio = Studio(self._model.id, loaded, self._device)
        self._warm(studio)
        together = studio.together(rules.side, rules.side)
        self.slots = max(LEAST_SLOTS, 2 * together)
        logger.info(
            "%s on %s in %s, weights on the %s: %d pictures of %d x %d together",
            self._model.id,
            self._device.name,
            loaded.dtype,
            loaded.place,
            together,
            rules.side,
            rules.side,
        )
        return Grouped(studio, between_steps)

    def _warm(self, studio: Studio) -> None:
        """Draw a small picture, so that what cannot draw is no engine."""
        rules = self._drawing
        side = rules.side if rules.one_size else rules.least_side
        scale = 0.0 if rules.guidance is Guidance.NONE else rules.guidance_scale
        picture = Picture("a picture", "", (side, side), WARM_STEPS, scale, 0, lambda _: None)
        picture.pixels = studio.draw([picture], lambda *_: None)[0]
        try:
            self._image(picture)
        except EngineError as error:
            raise EngineLoadError(error.message) from error


def _png(image: Image.Image) -> str:
    """A PNG file as Base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
