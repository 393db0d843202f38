"""Drawing pictures together: one pass of a diffusers pipeline over those of equal size, steps and guidance."""

import inspect
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from engines.contract import Device, Report
from engines.grouped import Step
from engines.image_gen.pipelines import Loaded, Place, tile
from engines.memory import free_bytes
from engines.request import Request
from engines.thread import is_out_of_memory

logger = logging.getLogger(__name__)

#: Pictures drawn together at most; more would only let each of them wait for the others.
MOST_TOGETHER = 4

#: Pixels drawn together on a CPU, where only small pictures gain by it. CPU time of a picture alone and in a pass of
#: four, with the demo's pipeline on one core: 64 x 64 0.29 s and 0.12 s, 128 x 128 0.48 s and 0.31 s, 256 x 256 1.3 s
#: and 1.4 s.
CPU_PIXELS = MOST_TOGETHER * 128 * 128


class Picture(Request):
    """A picture that is to be drawn."""

    advice = "Ask for a smaller width and height."

    def __init__(
        self,
        prompt: str,
        negative_prompt: str,
        size: tuple[int, int],
        steps: int,
        guidance_scale: float,
        seed: int,
        report: Report,
    ) -> None:
        """negative_prompt: only where it acts, else empty. size: width and height, in pixels."""
        super().__init__(report)
        self.prompt = prompt
        self.negative_prompt = negative_prompt
        self.width, self.height = size
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        #: What was drawn: float32, shape (height, width, 3), in [0, 1], or not a number where the model overflowed.
        self.pixels: npt.NDArray[np.float32] | None = None
        #: What the model did not read to its end, in words.
        self.cuts: list[str] = []

    @property
    def size(self) -> str:
        return f"A picture of {self.width} x {self.height}"


class Studio:
    """A loaded pipeline as the engine thread uses it."""

    unit = "step"

    def __init__(self, name: str, loaded: Loaded, device: Device) -> None:
        self._name = name
        self._pipeline = loaded.pipeline
        self._dtype = loaded.dtype
        self._reader = Reader(loaded.pipeline, loaded.drawing.prompt_tokens)
        self._options: dict[str, Any] = {}
        if loaded.drawing.prompt_tokens and self._reader.can_be_told:
            self._options["max_sequence_length"] = loaded.drawing.prompt_tokens
        #: Drawn together at most; one picture of any size always is.
        self._pixels = 0
        if device.name == "cpu":
            self._pixels = CPU_PIXELS
        elif loaded.place is Place.DEVICE:
            self._pixels = free_bytes(device, torch.device(device.name).index or 0) // loaded.sizes.per_pixel

    def together(self, width: int, height: int) -> int:
        """How many pictures of that size are drawn together at most."""
        return max(1, min(MOST_TOGETHER, self._pixels // (width * height)))

    def key(self, request: Picture) -> Hashable:
        """What a pipeline is told once for all pictures of a pass."""
        return (
            request.width,
            request.height,
            request.steps,
            request.guidance_scale,
            bool(request.negative_prompt),
        )

    def pick(self, alike: Sequence[Picture]) -> Sequence[Picture]:
        """The oldest ones that fit."""
        return alike[: self.together(alike[0].width, alike[0].height)]

    def compute(self, batch: Sequence[Picture], step: Step) -> None:
        """Draw them; a single one that does not fit waits again, if it can be decoded piece by piece then."""
        try:
            drawn = self.draw(batch, step)
        except Exception as error:
            if len(batch) > 1 or not is_out_of_memory(error) or not tile(self._pipeline):
                raise
            logger.warning("%s is out of memory with one picture: from now on it decodes them in tiles", self._name)
            return
        for picture, pixels in zip(batch, drawn, strict=True):
            picture.pixels = pixels
            picture.cuts = [
                f"The {label} was cut: {self._name} reads {self._reader.most_tokens} tokens of its {tokens}."
                for label, text in (("prompt", picture.prompt), ("negative_prompt", picture.negative_prompt))
                if (tokens := self._reader.count(text)) > self._reader.most_tokens
            ]
            picture.finish({})

    def draw(self, batch: Sequence[Picture], step: Step) -> npt.NDArray[np.float32]:
        """Pixels of pictures of one key: float32, shape (pictures, height, width, 3), in [0, 1] or not a number."""
        first = batch[0]
        options = dict(self._options)
        if first.negative_prompt:
            options["negative_prompt"] = [picture.negative_prompt for picture in batch]

        def after_step(pipeline: Any, done: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            step(done + 1, pipeline.num_timesteps)
            return tensors

        try:
            images: npt.NDArray[np.float32] = self._pipeline(
                prompt=[picture.prompt for picture in batch],
                width=first.width,
                height=first.height,
                num_inference_steps=first.steps,
                guidance_scale=first.guidance_scale,
                # On the CPU the same seed gives the same noise for every device, and with one for each picture it does
                # so in every company.
                generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in batch],
                output_type="np",
                callback_on_step_end=after_step,
                **options,
            ).images
        except Exception:
            # Else the component that computed last stays on the device, and the next ones join it there.
            self._pipeline.maybe_free_model_hooks()
            if self._pipeline.vae.dtype != self._dtype:
                # SDXL decodes in float32 and goes back to float16 afterwards, but not after an exception.
                self._pipeline.vae.to(dtype=self._dtype)
            raise
        return images


class Reader:
    """How much of a text a pipeline reads: what the text encoder that reads most can take."""

    def __init__(self, pipeline: Any, prompt_tokens: int | None) -> None:
        """prompt_tokens: what the pipeline is told; None leaves it at its default."""
        told = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
        #: Whether the pipeline takes max_sequence_length.
        self.can_be_told = told is not None
        # The last of its encoders reads most: T5 where there is one.
        self._tokenizer = next(
            getattr(pipeline, f"tokenizer{number}")
            for number in ("_3", "_2", "")
            if getattr(pipeline, f"text_encoder{number}", None) is not None
        )
        self.most_tokens: int = self._tokenizer.model_max_length
        if told:
            self.most_tokens = min(self.most_tokens, prompt_tokens or told.default)
        self._in_chat = isinstance(pipeline, diffusers.ZImagePipeline)

    def count(self, text: str) -> int:
        """Tokens of a text with all that belongs around it."""
        if self._in_chat:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        return len(self._tokenizer(text).input_ids)
