"""The model libraries as their users call them: a list of jobs in, their answers out, in one call of the library."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import diffusers
import soundfile
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

from bench.samples import Params, encoded
from engines.catalogue import DRAWINGS, Guidance, JobType, Model, Pooling
from engines.contract import Device
from engines.loading import locate, pick_dtype
from engines.text import checkpoint
from engines.vision import processors
from engines.whisper import speech_network


class Library(Protocol):
    """A loaded model and the usual call of it."""

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        """One answer a job: a vector, a PNG as Base64, or a text."""


class Embedding:
    """transformers' AutoModel, the pooling of the model's card, vectors of length 1."""

    def __init__(self, model: Model, device: Device) -> None:
        source = locate(model)
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        self._network = AutoModel.from_pretrained(source, dtype=dtype_of(device)).to(device.name).eval()
        self._first = model.sentence is not None and model.sentence.pooling is Pooling.CLS

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        inputs = self._tokenizer([job["input"] for job in jobs], padding=True, return_tensors="pt")
        inputs = inputs.to(self._network.device)
        hidden, mask = self._network(**inputs).last_hidden_state.float(), inputs["attention_mask"].unsqueeze(-1)
        pooled = hidden[:, 0] if self._first else (hidden * mask).sum(1) / mask.sum(1)
        return list(normalize(pooled).tolist())


class Whisper:
    """openai-whisper's transcribe(), which takes one clip."""

    def __init__(self, model: Model, device: Device) -> None:
        self._half = device.name != "cpu"
        self._network = speech_network.load(model, device, self._half)

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        (job,) = jobs
        samples, _ = soundfile.read(io.BytesIO(base64.b64decode(job["audio_base64"])), dtype="float32")
        heard = self._network.transcribe(samples, language=job["language"], fp16=self._half)
        return [heard["text"].strip()]


class Picture:
    """A diffusers pipeline."""

    def __init__(self, model: Model, device: Device) -> None:
        self._pipeline = diffusers.DiffusionPipeline.from_pretrained(locate(model), dtype=dtype_of(device))
        self._pipeline.to(device.name).set_progress_bar_config(disable=True)
        self._drawing = model.drawing or DRAWINGS[type(self._pipeline).__name__, False]

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        rules = self._drawing
        images = self._pipeline(
            prompt=[job["prompt"] for job in jobs],
            width=rules.side,
            height=rules.side,
            num_inference_steps=rules.steps,
            guidance_scale=0.0 if rules.guidance is Guidance.NONE else rules.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs],
        ).images
        return [png(image) for image in images]


class Vision:
    """A processor and generate(), several pictures padded on the left."""

    def __init__(self, model: Model, device: Device) -> None:
        source = locate(model)
        self._processor = processors.load(source)
        self._processor.tokenizer.padding_side = "left"
        network = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype_of(device))
        self._network = network.to(device.name).eval()

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": looked_at(job)}] for job in jobs],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(self._network.device)
        output = self._network.generate(**inputs, do_sample=False, max_new_tokens=jobs[0]["max_tokens"])
        return list(self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


class Llm:
    """generate(), several chats padded on the left."""

    def __init__(self, model: Model, device: Device) -> None:
        loaded = checkpoint.load(model, device)
        self._tokenizer, self._network = loaded.tokenizer, loaded.network
        self._tokenizer.padding_side = "left"

    def __call__(self, jobs: Sequence[Params]) -> list[Any]:
        inputs = self._tokenizer.apply_chat_template(
            [job["messages"] for job in jobs],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._network.device)
        output = self._network.generate(**inputs, do_sample=False, max_new_tokens=jobs[0]["max_tokens"])
        return list(self._tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


LIBRARIES: Mapping[JobType, Callable[[Model, Device], Library]] = {
    JobType.EMBEDDING: Embedding,
    JobType.WHISPER: Whisper,
    JobType.IMAGE_GEN: Picture,
    JobType.VISION: Vision,
    JobType.LLM: Llm,
}


def dtype_of(device: Device) -> torch.dtype:
    """What the engine computes in on that device."""
    dtype: torch.dtype = getattr(torch, pick_dtype(device))
    return dtype


def looked_at(job: Params) -> list[Params]:
    """The content of a message that asks something about a picture."""
    image = Image.open(io.BytesIO(base64.b64decode(job["image_base64"]))).convert("RGB")
    return [{"type": "image", "image": image}, {"type": "text", "text": job["question"]}]


def png(image: Image.Image) -> str:
    """A PNG file as Base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return encoded(file)
