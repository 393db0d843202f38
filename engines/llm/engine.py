"""Text generation with any causal language model of transformers.

One engine thread makes every torch call. Job threads prepare a row, hand it over and wait; the engine thread computes
all rows together (Batched) or, where a model's cache does not allow it, one after another (Alone).
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from engines.catalogue import Model
from engines.contract import GIB, Device, InvalidInput, Report
from engines.llm.alone import Alone
from engines.llm.batched import Batched
from engines.llm.choices import Choices
from engines.llm.slot_cache import BLOCK
from engines.llm.slot_network import TOLERANCE, SlotNetwork, is_plain, probe
from engines.memory import CACHE_SHARE, free_bytes
from engines.text.answer import Answer
from engines.text.checkpoint import load
from engines.text.grammar import Grammars
from engines.text.logprobs import Logprobs
from engines.text.row import Row
from engines.text.sampling import Sampler
from engines.text.vocabulary import Vocabulary
from engines.thread import EngineThread, Way

logger = logging.getLogger(__name__)

#: Rows computed together. More gain little on a CPU; on a GPU their caches would need the memory of long contexts.
SLOTS = 16

#: Prompt tokens read between two steps of the running rows, which wait meanwhile: about a second on two cores. A
#: burst of 16 chats was no slower on a CPU with 128 than with 256 (bench/llm_engine.py).
READ_TOKENS = {"cpu": 128, "cuda": 1024}

#: Context of models that state none: recurrent ones take any length.
UNKNOWN_CONTEXT = 8192

PROBE_TEXTS = ("A short text that is read beside another one.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")


class Engine:
    """A language model that answers up to `slots` conversations at once."""

    def __init__(self, model: Model, device: Device) -> None:
        self.slots = SLOTS
        #: Tokens that a prompt and its answer may have together.
        self.context = 0
        self._model = model
        self._device = device
        self._tokenizer: Any
        self._end_tokens: Collection[int]
        self._vocabulary: Vocabulary
        self._grammars: Grammars
        self._tokenizing = threading.Lock()
        self._thread: EngineThread[Row] = EngineThread(model.id, device, self._load)

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """An LlmResult for LlmParams."""
        prompt = self._tokenize(params["messages"])
        room = self.context - len(prompt)
        if room < 1:
            raise InvalidInput(
                f"The prompt has {len(prompt)} tokens, and {self._model.id} takes {self.context} here for prompt and "
                "answer together (max_tokens is cut to what is left). Shorten the messages.",
                code="prompt_too_long",
            )
        max_tokens = min(params["max_tokens"], room)
        choices = Choices(params["n"], max_tokens, report)
        choices.rows = [
            self._row(prompt, max_tokens, params, number, choices.report_of(number)) for number in range(params["n"])
        ]
        self._thread.submit_all(choices.rows)
        return {**choices.result(), "model": self._model.id}

    @property
    def batch(self) -> int:
        """How many jobs are being computed together now."""
        return self._thread.batch

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        self._thread.close()

    def _row(
        self, prompt: Sequence[int], max_tokens: int, params: Mapping[str, Any], number: int, report: Report
    ) -> Row:
        """The row of one of the job's answers."""
        form = params["response_format"] or {"type": "text"}
        answer = Answer(self._tokenizer.backend_tokenizer, params["stop"])
        return Row(
            prompt,
            max_tokens,
            Sampler(
                params["temperature"], params["top_p"], None if params["seed"] is None else params["seed"] + number
            ),
            answer,
            self._end_tokens,
            report,
            grammar=None if form["type"] == "text" else self._grammars.grammar(form),
            logprobs=Logprobs(self._vocabulary, answer, params["top_logprobs"]) if params["logprobs"] else None,
        )

    def _tokenize(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        # One at a time: a tokenizer that another thread uses raises "Already borrowed".
        with self._tokenizing:
            try:
                encoded = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
                )
            except TemplateError as error:
                raise InvalidInput(
                    f"The chat template of {self._model.id} refuses these messages: {error}",
                    code="messages_refused",
                ) from error
        ids: list[int] = encoded["input_ids"]
        return ids

    # From here on: the engine thread.

    def _load(self, between_steps: Callable[[], bool]) -> Way[Row]:
        checkpoint = load(self._model, self._device)
        network = checkpoint.network
        self._tokenizer, self._end_tokens = checkpoint.tokenizer, checkpoint.end_tokens
        self._vocabulary = Vocabulary(self._model.id, self._tokenizer, self._end_tokens)
        self._grammars = Grammars(self._vocabulary)
        penalty = network.generation_config.repetition_penalty or 1.0
        longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT
        slots = self._on_slots(network)
        if slots is None:
            self.slots, self.context = 1, longest
            return Alone(network, penalty, between_steps)
        cache = slots.cache
        free = free_bytes(self._device, loaded=network.get_memory_footprint())
        tokens = int(free * CACHE_SHARE[network.device.type] / cache.bytes_per_token)
        self.context = min(longest, tokens)
        cache.slots = self.slots = max(1, min(SLOTS, tokens // BLOCK))
        cache.budget_tokens = min(tokens, self.slots * longest)
        logger.info(
            "%s on %s in %s: %d slots, context %d, cache up to %.2f GiB",
            self._model.id,
            self._device.name,
            network.dtype,
            self.slots,
            self.context,
            cache.budget_tokens * cache.bytes_per_token / GIB,
        )
        return Batched(slots, penalty, READ_TOKENS[network.device.type])

    def _on_slots(self, network: Any) -> SlotNetwork | None:
        """The model on slots, or None if it does not compute there what it computes alone."""
        if not is_plain(network):
            logger.warning("%s keeps more than keys and values: its jobs are computed one by one", self._model.id)
            return None
        slots = SlotNetwork(network, SLOTS)
        first, second = (self._tokenizer.encode(text)[:24] for text in PROBE_TEXTS)
        error = probe(slots, network, (first, second))
        if error > TOLERANCE[network.dtype]:
            logger.warning("%s is computed one by one: batched, its logits are off by %.2g", self._model.id, error)
            return None
        return slots
