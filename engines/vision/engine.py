"""Questions about pictures with any image-text-to-text model of transformers.

Job threads decode the picture and let the processor cut it into patches and tokens; the engine thread makes every call
of the network, for several questions at a time where the model computes them together as it does alone.
"""

import base64
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from engines.catalogue import Model
from engines.contract import Device, EngineLoadError, InvalidInput, Report
from engines.grouped import Grouped
from engines.llm.slot_network import TOLERANCE
from engines.loading import hub_options, locate, pick_dtype
from engines.memory import CACHE_SHARE, LEAST_TOKENS, Need, free_bytes, need_of, placement
from engines.text.checkpoint import end_tokens, reason
from engines.text.sampling import Sampler
from engines.text.thinking import THOUGHT, Spoken
from engines.thread import EngineThread, Way, is_broken
from engines.vision import picture, processors
from engines.vision.picture import Picture
from engines.vision.question import Question
from engines.vision.viewer import Viewer

logger = logging.getLogger(__name__)

#: What the folder of a vision model holds.
PARTS = "config.json, *.safetensors, tokenizer.json, preprocessor_config.json and the chat template"

#: What is asked where the job's question is none, or only a further wish.
PROMPTS = {
    "image_caption": "Describe this image in detail.",
    "ocr": "Write out all the text in this image exactly as it appears, line by line. Answer with the text only.",
}

#: Questions of one pass, at most. A pass lasts as long as its longest answer; whoever comes meanwhile waits for it.
TOGETHER = {"cpu": 4, "cuda": 8}

#: Context of models that state none.
UNKNOWN_CONTEXT = 4096

#: Two pictures whose shapes and colours differ, each with a question; what both are made to answer.
PROBE_QUESTIONS = (((96, 64), (200, 40, 90), "What is this?"), ((56, 168), (10, 160, 60), "Is it red, blue or green?"))
PROBE_ANSWER = "A blue box"
GREEDY = Sampler(temperature=0.0, top_p=1.0, seed=None)


class Engine:
    """A vision model that answers up to `slots` questions at once."""

    def __init__(self, model: Model, device: Device) -> None:
        self.slots = 1
        #: Tokens that a prompt with its picture and the answer may have together.
        self.context = 0
        self._model = model
        self._device = device
        self._processor: Any
        self._picture_token: int
        self._end_tokens: Collection[int]
        #: What a question must not contain, where the processor cannot take it as plain text.
        self._forbidden: Sequence[str] = ()
        #: The chat template itself begins the model's thought.
        self._opened: bool
        self._processing = threading.Lock()
        self._thread: EngineThread[Question] = EngineThread(model.id, device, self._load)

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """A VisionResult for VisionParams."""
        asked = "\n".join(filter(None, (PROMPTS.get(params["task"]), params["question"])))
        # One at a time: neither processors nor tokenizers may be used by two threads, and a picture of 50 megapixels
        # takes half a gigabyte while it is decoded.
        with self._processing:
            seen = picture.read(base64.b64decode(params["image_base64"]))
            warnings = [*seen.warnings, *self._reduced(seen)]
            inputs = self._prepare(seen.image, asked)
        sampler = Sampler(params["temperature"], params["top_p"], params["seed"])
        question = self._question(inputs, seen.sent_size, params["max_tokens"], sampler, report)
        self._thread.submit(question)
        warnings += _unsaid(question)
        return {
            "response": question.answer.text,
            "task": params["task"],
            "finish_reason": question.finish_reason,
            "model": self._model.id,
            "usage": {
                "prompt_tokens": question.prompt_tokens,
                "completion_tokens": question.completion_tokens,
                "total_tokens": len(question.ids),
            },
            **({"warnings": warnings} if warnings else {}),
        }

    @property
    def batch(self) -> int:
        """How many jobs are being computed together now."""
        return self._thread.batch

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        self._thread.close()

    def _prepare(self, image: Image.Image, asked: str) -> Mapping[str, torch.Tensor]:
        if forbidden := next((token for token in self._forbidden if token in asked), None):
            raise InvalidInput(f"question: {forbidden} is a control token of {self._model.id}.", code="control_token")
        content = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
        try:
            inputs: Mapping[str, torch.Tensor] = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                # A question may speak of "<image>" or "<|im_end|>" without meaning it.
                sanitize_control_tokens=not self._forbidden,
            )
        except (ValueError, IndexError, TemplateError) as error:
            said = " ".join(str(error).split())[:300]
            raise InvalidInput(
                f"{self._model.id} cannot take this picture of {image.width} x {image.height} pixels with this "
                f"question: {said}",
                code="picture_refused",
            ) from error
        return inputs

    def _question(
        self,
        inputs: Mapping[str, torch.Tensor],
        size: tuple[int, int],
        max_tokens: int,
        sampler: Sampler,
        report: Report,
    ) -> Question:
        length = inputs["input_ids"].shape[1]
        room = self.context - length
        if room < 1:
            of_picture = int((inputs["input_ids"] == self._picture_token).sum())
            raise InvalidInput(
                f"The prompt has {length} tokens, {of_picture} of them for the picture of {size[0]} x {size[1]} "
                f"pixels, and {self._model.id} takes {self.context} here for prompt and answer together (max_tokens is "
                "cut to what is left). Send a smaller picture or a shorter question.",
                code="prompt_too_long",
            )
        answer = Spoken(self._processor.tokenizer.backend_tokenizer, self._opened)
        return Question(inputs, size, min(max_tokens, room), answer, self._end_tokens, sampler, report)

    def _reduced(self, seen: Picture) -> list[str]:
        """A warning if the model would have seen more of a picture that was not reduced."""
        if not seen.reduced or not self._sees_more:
            return []
        (width, height), image = seen.sent_size, seen.image
        return [
            f"The picture of {width} x {height} pixels was reduced to {image.width} x {image.height} before the model "
            "looked at it: small writing may be lost. Cut out the part that matters."
        ]

    @cached_property
    def _sees_more(self) -> bool:
        """Whether pictures above picture.MOST_SHOWN_PIXELS would become more tokens; many processors reduce further."""
        side = int(picture.MOST_SHOWN_PIXELS**0.5)
        most, more = (self._prepare(Image.new("RGB", (size, size)), "?") for size in (side, side * 5 // 4))
        return bool(more["input_ids"].shape[1] > most["input_ids"].shape[1])

    # From here on: the engine thread.

    def _load(self, between_steps: Callable[[], bool]) -> Way[Question]:
        source = locate(self._model)
        dtype = getattr(torch, pick_dtype(self._device))
        try:
            config = AutoConfig.from_pretrained(source, **hub_options(self._model))
            if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                raise ValueError(f"It is a {config.model_type} model, which answers no questions about pictures.")
            need = need_of(config, dtype, AutoModelForImageTextToText)
            where = placement(self._model.id, need, self._device)
            self._processor = processors.load(source, **hub_options(self._model))
            network = AutoModelForImageTextToText.from_pretrained(
                source, config=config, dtype=dtype, use_safetensors=True, **hub_options(self._model), **where
            ).eval()
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise EngineLoadError(reason(self._model, source, error, PARTS)) from error
        self._learn_to_talk(network, source)
        viewer = Viewer(network, sorted(self._end_tokens), self._pad_token())
        self._share_memory(viewer, network, need)
        self._share_passes(viewer, network)
        logger.info(
            "%s on %s in %s: %d at a time, context %d",
            self._model.id,
            self._device.name,
            network.dtype,
            self.slots,
            self.context,
        )
        return Grouped(viewer, between_steps)

    def _learn_to_talk(self, network: Any, source: str) -> None:
        """How a conversation with this model is written down."""
        tokenizer = self._processor.tokenizer
        if not tokenizer.is_fast:
            raise EngineLoadError(f"{self._model.id} ({source}) has no tokenizer.json, which streaming needs.")
        if not self._processor.chat_template:
            raise EngineLoadError(
                f"{self._model.id} ({source}) has no chat template, so it cannot be asked anything: choose its "
                "instruct or chat version, or put a chat_template.jinja into a local copy."
            )
        try:
            self._prepare(Image.new("RGB", (28, 28)), "?")
        except NotImplementedError:
            # Tokenizers that put a token of their own before every text (LLaVA's) do not sanitize.
            self._forbidden = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._picture_token = self._processor.image_token_id
        self._end_tokens = end_tokens(network, tokenizer, self._processor)
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "?"}]}], add_generation_prompt=True
        )
        self._opened = prompt.rstrip().endswith(THOUGHT[0])

    def _pad_token(self) -> int:
        padding = self._processor.tokenizer.pad_token_id
        return min(self._end_tokens) if padding is None else int(padding)

    def _share_memory(self, viewer: Viewer, network: Any, need: Need) -> None:
        longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT
        free = free_bytes(self._device, loaded=network.get_memory_footprint()) * CACHE_SHARE[network.device.type]
        viewer.budget_tokens = int(free * LEAST_TOKENS / need.working_bytes)
        self.context = min(longest, viewer.budget_tokens)

    def _share_passes(self, viewer: Viewer, network: Any) -> None:
        """Let questions share passes if the model then computes what it computes alone."""
        questions = [
            self._question(self._prepare(_pattern(size, colour), asked), size, 1024, GREEDY, lambda _: None)
            for size, colour, asked in PROBE_QUESTIONS
        ]
        answer = self._processor.tokenizer.encode(PROBE_ANSWER, add_special_tokens=False)
        alone = torch.cat([viewer.logits([question], answer) for question in questions])
        try:
            together = viewer.logits(questions, answer)
        except Exception as failure:
            if is_broken(failure):
                raise
            logger.warning("%s answers one by one: it cannot compute batches: %s", self._model.id, failure)
            return
        # Without their mean, which no choice of a token depends on and which can hide what differs.
        found, wanted = (logits - logits.mean(dim=-1, keepdim=True) for logits in (together, alone))
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE[network.dtype]:
            logger.warning("%s answers one by one: batched, its logits are off by %.2g", self._model.id, error)
            return
        self.slots = viewer.together = TOGETHER[network.device.type]


def _pattern(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """A picture with a box of that colour in the upper left on a gradient, so that no two parts of it are alike."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste(colour, (0, 0, size[0] // 2, size[1] // 3))
    return image


def _unsaid(question: Question) -> Sequence[str]:
    """A warning if the model never came to its answer."""
    if not question.answer.thinking:
        return ()
    if question.finish_reason == "length":
        return ("max_tokens ended the output while the model still thought, before its answer began: raise it.",)
    return ("The model ended its output inside its thoughts, without an answer.",)
