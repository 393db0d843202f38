"""Text generation with any causal language model of transformers.

One engine thread makes every torch call. Job threads prepare a row, hand it over and wait; the engine thread computes
all rows together (Batched) or, where a model's cache does not allow it, one after another (Alone).
"""

import gc
import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from jinja2 import TemplateError

from engines.alone import Alone
from engines.answer import Answer
from engines.batched import Batched
from engines.catalogue import Model
from engines.checkpoint import load
from engines.contract import Device, EngineBroken, EngineError, InvalidInput, OutOfMemory, Report
from engines.memory import CACHE_SHARE, GIB, free_bytes
from engines.row import Row
from engines.sampling import Sampler
from engines.slot_cache import BLOCK, CacheFull
from engines.slot_network import TOLERANCE, SlotNetwork, is_plain, probe

logger = logging.getLogger(__name__)

#: Rows computed together. More gain little on a CPU; on a GPU their caches would need the memory of long contexts.
SLOTS = 16

#: Prompt tokens read between two steps of the running rows, which wait meanwhile: about a second on two cores. A
#: burst of 16 chats was no slower on a CPU with 128 than with 256 (bench/llm_engine.py).
READ_TOKENS = {"cpu": 128, "cuda": 1024}

#: Context of models that state none: recurrent ones take any length.
UNKNOWN_CONTEXT = 8192

PROBE_TEXTS = ("A short text that is read beside another one.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")


class Way(Protocol):
    """How rows are computed: Batched or Alone."""

    rows: list[Row]
    stepping: Sequence[Row]

    def turn(self, waiting: deque[Row]) -> None:
        """Take rows from the waiting ones as there is room, and compute a little."""

    def give_up(self) -> Row:
        """Take out one row, so that the others have its memory."""

    def reap(self) -> None:
        """Take out the rows that have ended."""


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
        self._tokenizing = threading.Lock()
        #: Rows to be computed, in their order; the engine thread's own.
        self._waiting: deque[Row] = deque()
        # What job threads and the engine thread share, under the condition's lock.
        self._news = threading.Condition()
        self._inbox: list[Row] = []
        self._closing = False
        self._broken: str | None = None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, args=(ready,), name=f"llm {model.id}", daemon=True)
        self._thread.start()
        ready.result()

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
        row = Row(
            prompt,
            min(params["max_tokens"], room),
            Sampler(params["temperature"], params["top_p"], params["seed"]),
            Answer(self._tokenizer.backend_tokenizer, params["stop"]),
            self._end_tokens,
            report,
        )
        self._submit(row)
        row.ended.wait()
        if row.error:
            raise row.error
        return {
            "response": row.answer.text,
            "finish_reason": row.finish_reason,
            "model": self._model.id,
            "usage": {
                "prompt_tokens": row.prompt_tokens,
                "completion_tokens": row.completion_tokens,
                "total_tokens": len(row.ids),
            },
        }

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

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

    def _submit(self, row: Row) -> None:
        with self._news:
            if self._broken:
                raise EngineBroken(self._broken)
            self._inbox.append(row)
            self._news.notify()

    # From here on: the engine thread.

    def _live(self, ready: "Future[None]") -> None:
        with torch.inference_mode():
            try:
                way = self._load()
            except BaseException as error:  # noqa: BLE001 - the constructor raises it
                ready.set_exception(error)
                return
            ready.set_result(None)
            try:
                self._serve(way)
            finally:
                self._end(way)
        del way
        gc.collect()
        if self._device.name != "cpu":
            torch.cuda.empty_cache()

    def _load(self) -> Way:
        checkpoint = load(self._model, self._device)
        network = checkpoint.network
        self._tokenizer, self._end_tokens = checkpoint.tokenizer, checkpoint.end_tokens
        longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT
        slots = self._on_slots(network)
        if slots is None:
            self.slots, self.context = 1, longest
            return Alone(network, self._look_after_waiting)
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
        penalty = network.generation_config.repetition_penalty or 1.0
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

    def _serve(self, way: Way) -> None:
        while self._wait_for_work(way):
            self._look_after_waiting()
            short, failure = None, None
            try:
                if self._waiting or way.rows:
                    way.turn(self._waiting)
            except Exception as error:
                if isinstance(error, CacheFull) or is_out_of_memory(error):
                    short = str(error)
                else:
                    logger.exception("a step of %s failed", self._model.id)
                    failure = _verdict(error)
            # Only out here: as long as the error's traceback lives, so do the tensors of its frames (pytorch#18853).
            if short:
                self._make_room(way, short)
            if failure:
                self._fail(way, failure)

    def _wait_for_work(self, way: Way) -> bool:
        """True once there is something to do, false once the engine is to end."""
        with self._news:
            self._news.wait_for(lambda: self._closing or self._broken or self._inbox or self._waiting or way.rows)
            return not (self._closing or self._broken)

    def _look_after_waiting(self) -> bool:
        """Take in new rows, and let report() stop those that still wait. False once the engine is to end."""
        with self._news:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        for row in self._waiting:
            row.poll()
        for row in [row for row in self._waiting if row.ended.is_set()]:
            self._waiting.remove(row)
        return not self._closing

    def _make_room(self, way: Way, short: str) -> None:
        """Out of memory: put one row back to the waiting ones, or fail the only one."""
        gc.collect()
        if self._device.name != "cpu":
            torch.cuda.empty_cache()
        if len(way.rows) > 1:
            row = way.give_up()
            logger.warning("%s is out of memory with %d rows: one waits again", self._model.id, len(way.rows) + 1)
            self._waiting.appendleft(row)
            return
        for row in way.rows:
            row.end(
                OutOfMemory(
                    f"{len(row.ids)} tokens of {self._model.id} do not fit {self._device.name} even alone, where "
                    f"{free_bytes(self._device) / GIB:.2f} GiB are free: {short}. Shorten the messages or max_tokens."
                )
            )
        way.reap()

    def _fail(self, way: Way, failure: EngineError) -> None:
        """End the rows of the step that failed, or the engine if that is broken or the failure is nobody's."""
        rows = [row for row in way.stepping if not row.ended.is_set()]
        for row in rows:
            row.end(type(failure)(failure.message))
        way.reap()
        if isinstance(failure, EngineBroken) or not rows:
            self._broken = failure.message

    def _end(self, way: Way) -> None:
        """Let nobody wait for an engine that computes no more."""
        with self._news:
            self._broken = self._broken or f"The engine of {self._model.id} was closed."
            rows = [*self._inbox, *self._waiting, *way.rows]
            self._inbox.clear()
        for row in rows:
            row.end(EngineBroken(self._broken))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    # On the CPU torch has no class of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _verdict(error: Exception) -> EngineError:
    """What a failed step means for its jobs. Keeps the text alone: the error's frames hold tensors."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    # After these a CUDA context answers every call with the same error, until the process ends.
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return EngineBroken(f"The GPU is unusable until the worker is started again. {text}")
    return EngineError(f"A step of the model failed. {text}")
