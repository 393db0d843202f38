"""Vectors of texts, with any BERT-like encoder of transformers.

Job threads tokenise; the engine thread computes the texts of all jobs together (Grouped), sorted by length and cut into
micro-batches, so that little is spent on padding.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engines.catalogue import Model, Pooling
from engines.contract import Device, EngineError, InvalidInput, Progress, Report
from engines.embedding.sentences import Checkpoint, fitting_device, load
from engines.grouped import Grouped, Limit, Step
from engines.request import Request
from engines.thread import EngineThread, Way, empty_cache, is_out_of_memory

logger = logging.getLogger(__name__)

SLOTS = 64

#: Tokens of one micro-batch, padding included: a cancel waits for one of them. A single longer text is one by itself.
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}

#: Tokens of one job in one pass. A larger job waits behind all others before it goes on.
SHARE_TOKENS = {"cpu": 2048, "cuda": 32_768}

#: Tokens of one pass: what a job that has just come waits for.
PASS_TOKENS = {"cpu": 4096, "cuda": 65_536}

#: What one more micro-batch costs, in tokens: with 128, 16 mixed texts were computed at 124 texts/s on two cores, as
#: one padded batch at 85. On a GPU it is launching some 400 kernels, a few ms: an estimate.
OVERHEAD_TOKENS = {"cpu": 128, "cuda": 1024}

#: Texts that are tokenised between two reports.
TOKENISE = 64

WARM_UP = ("A short text.", "A longer text that is read beside a short one.")

#: Decimals of a vector's numbers. float32 is good for 7; with all that Python prints, 1000 vectors of 1024 were 22.7 MB
#: of JSON, with these 12.7.
DECIMALS = 8


class Texts(Request):
    """The texts of one job: their tokens, and their vectors so far."""

    advice = "Send shorter texts."

    def __init__(self, ids: Sequence[Sequence[int]], dimensions: int, report: Report) -> None:
        super().__init__(report)
        #: Tokens of each text.
        self.ids = ids
        #: float32, shape (texts, dimensions).
        self.vectors = np.empty((len(ids), dimensions), dtype=np.float32)
        #: Places of the texts that have no vector yet, shortest text first.
        self._left = dict.fromkeys(sorted(range(len(ids)), key=lambda place: len(ids[place])))

    @property
    def size(self) -> str:
        """The longest text that is left."""
        return f"A text of {max(len(self.ids[place]) for place in self._left)} tokens"

    def share(self, tokens: int) -> list[int]:
        """Places of the texts to compute next: as many as have that many tokens, one at least."""
        places: list[int] = []
        for place in self._left:
            tokens -= len(self.ids[place])
            if places and tokens < 0:
                break
            places.append(place)
        return places

    def accept(self, place: int, vector: np.ndarray) -> None:
        """Keep the vector of the text at that place."""
        if not np.isfinite(vector).all():
            self.end(EngineError(f"The model computed no numbers (NaN or infinity) for input.{place}."))
        self.vectors[place] = vector
        del self._left[place]

    def poll(self) -> None:
        """Tell how far it is, and so let report() stop it; that was all if no text is left."""
        self.tell(Progress(len(self.ids) - len(self._left), len(self.ids), "text"))
        if not self._left:
            self.ended.set()


@dataclass(frozen=True, slots=True)
class Item:
    """One text of a job."""

    owner: Texts
    place: int

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens."""
        return self.owner.ids[self.place]


class Encoder:
    """A loaded encoder: computes texts of any jobs together. Used by the engine thread alone."""

    unit = "text"

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        kind = device.name.partition(":")[0]
        self._checkpoint = checkpoint
        self._device = device
        self._share_tokens = SHARE_TOKENS[kind]
        self._pass_tokens = PASS_TOKENS[kind]
        self._overhead_tokens = OVERHEAD_TOKENS[kind]
        self._limit = Limit(MICRO_BATCH_TOKENS[kind])

    def key(self, request: Texts) -> Hashable:
        """All texts can be computed together."""
        return None

    def pick(self, alike: Sequence[Texts]) -> Sequence[Texts]:
        """The oldest jobs, until their shares fill a pass."""
        picked: list[Texts] = []
        room = self._pass_tokens
        for request in alike:
            if room <= 0:
                break
            room -= sum(len(request.ids[place]) for place in request.share(self._share_tokens))
            picked.append(request)
        return picked

    def compute(self, batch: Sequence[Texts], step: Step) -> None:
        """A share of each job.

        Where memory is short, micro-batches are halved; a text that does not fit by itself is left to a pass in which
        its job is alone, and fails that one.
        """
        shares = [Item(owner, place) for owner in batch for place in owner.share(self._share_tokens)]
        queue = deque(self._cut(shares))
        while queue:
            texts = [text for text in queue.popleft() if self._is_wanted(text, batch)]
            if not texts:
                continue
            vectors = self._try([text.ids for text in texts], last=len(batch) == len(texts) == 1)
            if vectors is not None:
                self._limit.fitted(_padded(texts))
                for text, vector in zip(texts, vectors, strict=True):
                    text.owner.accept(text.place, vector)
            else:
                empty_cache(self._device)
                if len(texts) == 1:
                    texts[0].owner.alone = True
                else:
                    self._limit.halve(_padded(texts))
                    logger.warning("out of memory with %d texts: at most %d tokens now", len(texts), self._limit.now)
                    queue.extendleft(reversed(self._cut(texts)))
            step()

    def vectors(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 vectors of length 1, shape (texts, dimensions), of the tokens of some texts."""
        device, longest = self._checkpoint.network.device, max(map(len, texts))
        ids = torch.full((len(texts), longest), self._checkpoint.padding)
        mask = torch.zeros((len(texts), longest), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        mask = mask.to(device)
        hidden = self._checkpoint.network(input_ids=ids.to(device), attention_mask=mask).last_hidden_state
        if self._checkpoint.sentence.pooling is Pooling.CLS:
            pooled = hidden[:, 0].float()
        else:
            read = mask.unsqueeze(-1)
            pooled = (hidden.float() * read).sum(dim=1) / read.sum(dim=1)
        result: np.ndarray = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return result

    def _try(self, texts: Sequence[Sequence[int]], last: bool) -> np.ndarray | None:
        """Their vectors, or None if memory is short. last: nothing can be made smaller, so that error is raised too."""
        try:
            return self.vectors(texts)
        except Exception as error:
            if last or not is_out_of_memory(error):
                raise
        return None

    def _is_wanted(self, text: Item, batch: Sequence[Texts]) -> bool:
        """False once its job has ended, or is to wait for a pass of its own."""
        return not text.owner.ended.is_set() and (len(batch) == 1 or not text.owner.alone)

    def _cut(self, texts: Sequence[Item]) -> list[list[Item]]:
        in_order = sorted(texts, key=lambda text: len(text.ids))
        parts = cut([len(text.ids) for text in in_order], self._limit.now, self._overhead_tokens)
        return [in_order[part.start : part.stop] for part in parts]


class Engine:
    """An embedding model that answers up to `slots` jobs at once."""

    def __init__(self, model: Model, device: Device) -> None:
        self.slots = SLOTS
        self.dimensions = 0
        self._model = model
        # Looks at the configuration alone: the weights are touched in the engine thread and nowhere else.
        self._device = fitting_device(model, device, MICRO_BATCH_TOKENS)
        # Of the checkpoint, what job threads use.
        self._tokenizer: Any
        self._lower = False
        self._prefixes: Mapping[str, str]
        self._most_tokens = 0
        self._thread: EngineThread[Texts] = EngineThread(model.id, self._device, self._load)

    def run(self, params: Mapping[str, Any], report: Report) -> dict[str, Any]:
        """An EmbeddingResult for EmbeddingParams."""
        ids, shortened = self._tokenise(params, report)
        texts = self._thread.submit(Texts(ids, self.dimensions, report))
        tokens = sum(map(len, ids))
        result: dict[str, Any] = {
            "embeddings": texts.vectors.astype(np.float64).round(DECIMALS).tolist(),
            "dimensions": self.dimensions,
            "model": self._model.id,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        if shortened:
            words = f"{shortened} of {len(ids)} texts were cut to the {self._most_tokens} tokens that are read."
            result["warnings"] = [words]
        return result

    @property
    def batch(self) -> int:
        """How many jobs are being computed together now."""
        return self._thread.batch

    def close(self) -> None:
        """Free the device. Jobs that still run end with EngineBroken."""
        self._thread.close()

    def _tokenise(self, params: Mapping[str, Any], report: Report) -> tuple[list[list[int]], int]:
        """Tokens of each text with its prefix, and how many texts were cut. Raises InvalidInput."""
        texts, prefix = params["input"], self._prefixes[params["input_type"]]
        ids: list[list[int]] = []
        shortened = 0
        for start in range(0, len(texts), TOKENISE):
            report(Progress(0, len(texts), "text"))
            some = [prefix + text for text in texts[start : start + TOKENISE]]
            for encoding in self._tokenizer.encode_batch_fast([text.lower() for text in some] if self._lower else some):
                if encoding.overflowing:
                    if not params["truncate"]:
                        raise self._too_long(len(ids), encoding)
                    shortened += 1
                ids.append(encoding.ids)
        return ids, shortened

    def _too_long(self, place: int, encoding: Any) -> InvalidInput:
        # Each of the pieces that were cut off has special tokens around it again.
        around = self._tokenizer.num_special_tokens_to_add(False)
        tokens = len(encoding.ids) + sum(len(piece.ids) - around for piece in encoding.overflowing)
        return InvalidInput(
            f"input.{place} has {tokens} tokens, and {self._model.id} reads {self._most_tokens}, prefix and special "
            "tokens included. Shorten or split it, or set truncate to true.",
            code="input_too_long",
        )

    # From here on: the engine thread.

    def _load(self, between_steps: Callable[[], bool]) -> Way[Texts]:
        checkpoint = load(self._model, self._device)
        sentence = checkpoint.sentence
        self._tokenizer, self._lower = checkpoint.tokenizer, checkpoint.lower
        self._prefixes = {"query": sentence.query_prefix, "passage": sentence.passage_prefix}
        self._most_tokens = sentence.most_tokens
        encoder = Encoder(checkpoint, self._device)
        self.dimensions = encoder.vectors([self._tokenizer.encode(text).ids for text in WARM_UP]).shape[1]
        logger.info(
            "%s on %s in %s: %d dimensions by %s, texts of up to %d tokens",
            self._model.id,
            self._device.name,
            checkpoint.network.dtype,
            self.dimensions,
            sentence.pooling,
            sentence.most_tokens,
        )
        return Grouped(encoder, between_steps)


def cut(lengths: Sequence[int], most: int, overhead: int) -> list[range]:
    """Where to cut texts, given their lengths in ascending order, so that computing all parts costs least.

    A part costs its number of texts times its longest, and `overhead` more; it costs `most` at most, unless it is a
    single text. By dynamic programming over the part that ends at each text.
    """
    cost = np.zeros(len(lengths) + 1, dtype=np.int64)
    start = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end, longest in enumerate(lengths, 1):
        first = max(0, end - max(1, most // longest))
        rows = np.arange(end - first, 0, -1)
        costs = cost[first:end] + rows * longest + overhead
        best = int(costs.argmin())
        cost[end], start[end] = costs[best], first + best
    parts: list[range] = []
    end = len(lengths)
    while end:
        parts.append(range(int(start[end]), end))
        end = parts[-1].start
    return parts[::-1]


def _padded(texts: Sequence[Item]) -> int:
    """Tokens that computing them together takes, padding included."""
    return len(texts) * max(len(text.ids) for text in texts)
