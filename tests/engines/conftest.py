"""Tiny random checkpoints of the families in the catalogue, and engines over them; no network."""

import os

# Before anything imports them: no look at the hub, and one core for models this small (a second one only waits).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Whisper's alignment of words, which numba would compile for ten seconds.
os.environ["NUMBA_DISABLE_JIT"] = "1"

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engines.catalogue import JobType, Model
from engines.contract import Device, Progress, Report, Text
from engines.llm.engine import Engine
from engines.loading import resolve
from engines.schemas import load_params

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["Hello, how are you today?", "The quick brown fox jumps.", "你好，请介绍一下自己。", "user assistant system"]
#: A wide initialisation: with the usual one the next token would hardly depend on what attention reads.
SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
WINDOW: Mapping[str, Any] = {"sliding_window": 24}
MLA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
BOTH_KINDS = ["sliding_attention", "full_attention"]
FAMILIES: Mapping[str, tuple[type, Mapping[str, Any]]] = {
    "qwen2": (transformers.Qwen2Config, {}),
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, **WINDOW, "layer_types": BOTH_KINDS}),
    "mistral": (transformers.MistralConfig, WINDOW),
    "glm": (transformers.GlmConfig, {"head_dim": 16}),
    "deepseek_v2": (transformers.DeepseekV2Config, MLA),
    # Half of its layers are convolutions: their state is not keys and values.
    "lfm2": (transformers.Lfm2Config, {"layer_types": ["conv", "full_attention"]}),
}


class Recorder:
    """A report() that keeps what it hears, and raises an error from the given step on."""

    def __init__(self, error: Exception | None = None, at: int = 0) -> None:
        self.error = error
        self.at = at
        self.heard: list[Progress | Text] = []

    def __call__(self, event: Progress | Text) -> None:
        self.heard.append(event)
        if self.error and isinstance(event, Progress) and event.done >= self.at:
            raise self.error

    @property
    def text(self) -> str:
        return "".join(event.delta for event in self.heard if isinstance(event, Text))

    @property
    def steps(self) -> list[int]:
        return [event.done for event in self.heard if isinstance(event, Progress)]


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer, so that every text goes through and one character is often several tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(family: str, folder: Path) -> Path:
    """Save a random checkpoint that never ends an answer by itself."""
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    kind, extra = FAMILIES[family]
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": end,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = kind(**{**SIZES, "tie_word_embeddings": False, **extra, **ids})
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.lm_head.weight.data[end] = 0  # the highest of 400 logits is never the one that is 0
    network.generation_config.eos_token_id = end
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    if family == "qwen3":
        network.generation_config.repetition_penalty = 1.3  # as real Qwen models ask for
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint."""
    return cache(lambda family: build(family, tmp_path_factory.mktemp("tiny") / family))


@pytest.fixture(scope="session")
def tiny_model(checkpoint: Callable[[str], Path]) -> Callable[[str], Model]:
    """The model of a family's checkpoint."""
    return lambda family: resolve(JobType.LLM, str(checkpoint(family)))


@pytest.fixture(scope="session")
def engine_of(tiny_model: Callable[[str], Model]) -> Iterator[Callable[[str], Engine]]:
    """The engine of a family, loaded once; tests that break or close one load their own."""
    loaded: dict[str, Engine] = {}

    def get(family: str) -> Engine:
        if family not in loaded:
            loaded[family] = Engine(tiny_model(family), Device("cpu", dtype="float32"))
        return loaded[family]

    yield get
    for engine in loaded.values():
        engine.close()


@pytest.fixture(scope="session")
def generate(checkpoint: Callable[[str], Path]) -> Callable[..., tuple[str, int]]:
    """What transformers' own generate() answers, alone and greedy: text and number of tokens."""

    @cache
    def parts(family: str) -> tuple[Any, Any]:
        folder = checkpoint(family)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return network, transformers.AutoTokenizer.from_pretrained(folder)

    @cache
    def answer(family: str, text: str, max_tokens: int) -> tuple[str, int]:
        network, tokenizer = parts(family)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokenizer.decode(ids, skip_special_tokens=True), len(ids)

    return answer


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """Run one question through an engine; greedy unless said otherwise."""

    def run(engine: Engine, text: str, report: Report = lambda _: None, **options: Any) -> dict[str, Any]:
        asked = {"max_tokens": 24, "temperature": 0.0, "top_p": 1.0, **options}
        return engine.run(load_params(JobType.LLM, {"messages": [{"role": "user", "content": text}], **asked}), report)

    return run
