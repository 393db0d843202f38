"""Reading an embedding model: its encoder, its tokenizer, and how it was trained to read texts."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer

from engines import pickled
from engines.catalogue import MODELS, Model, Pooling, Sentence
from engines.contract import Device, EngineLoadError
from engines.loading import hub_options, locate, pick_dtype
from engines.memory import Need, does_not_fit, free_bytes, need_of
from engines.text.checkpoint import reason

logger = logging.getLogger(__name__)

#: Architectures (config.json's model_type) that read a text in both directions and take padding on the right: each was
#: compared alone and padded. A decoder's vectors mean something only with a pooling of its own.
ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "gte",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
    }
)

#: What the folder of an embedding model holds.
PARTS = "config.json, *.safetensors and tokenizer.json"
#: The one file of weights of a repository without safetensors.
PICKLE = "pytorch_model.bin"
#: Those that are read: SHA-256, in hex.
KNOWN_PICKLES = frozenset(row.pickled for row in MODELS if row.pickled)

#: Longest text of a model that states no length at all, in tokens.
UNKNOWN_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded embedding model."""

    #: The transformers encoder, on its device.
    network: Any
    #: A tokenizers.Tokenizer that cuts at sentence.most_tokens. Nobody may change it: so any number of threads can use
    #: it at once, where transformers' own wrapper sets it anew for each call and raises "Already borrowed".
    tokenizer: Any
    padding: int
    sentence: Sentence
    #: Texts are put into lower case first.
    lower: bool


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a folder's files of sentence-transformers say."""

    #: Where the encoder is.
    encoder: str
    sentence: Sentence | None = None
    lower: bool = False


def fitting_device(model: Model, device: Device, pass_tokens: Mapping[str, int]) -> Device:
    """The device that holds the model: the wanted one, or the CPU where the model does not fit and offload is set.

    pass_tokens: how many tokens a pass computes at once, padding included, by kind of device.
    Raises EngineLoadError, with the arithmetic if the model fits nowhere.
    """
    config = _config(model, _layout(model).encoder)
    need = _need(config, getattr(torch, pick_dtype(device)), pass_tokens[device.name.partition(":")[0]])
    free = free_bytes(device)
    if need.bytes <= free:
        return device
    words = does_not_fit(model.id, need, device, {device.name: free})
    if device.name == "cpu" or not device.offload:
        raise EngineLoadError(words)
    logger.warning("%s It is loaded on the CPU.", words)
    return fitting_device(model, Device("cpu", device.dtype), pass_tokens)


def load(model: Model, device: Device) -> Checkpoint:
    """The model's weights and tokenizer, in the device's dtype.

    Raises EngineLoadError.
    """
    layout = _layout(model)
    source = layout.encoder
    config = _config(model, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(model))
        network, said = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=getattr(torch, pick_dtype(device)),
            use_safetensors=_has_safetensors(model, source),
            weights_only=True,
            **hub_options(model),
            output_loading_info=True,
            **({} if device.name == "cpu" else {"device_map": {"": device.name}}),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise EngineLoadError(reason(model, source, error, PARTS)) from error
    _check(model, source, network, tokenizer, said["missing_keys"])
    sentence = model.sentence or layout.sentence or Sentence(Pooling.MEAN, most_tokens=0)
    lengths = {sentence.most_tokens, _positions(network), 0 if model.sentence else tokenizer.model_max_length}
    # What a tokenizer states that knows no length is 1e30.
    known = [length for length in lengths if length and length < 10**9]
    sentence = replace(sentence, most_tokens=min(known, default=UNKNOWN_LENGTH))
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(sentence.most_tokens, direction=tokenizer.truncation_side)
    return Checkpoint(network.eval(), backend, tokenizer.pad_token_id or 0, sentence, layout.lower)


def _has_safetensors(model: Model, source: str) -> bool:
    """Whether the weights are safetensors; if not, they are one of the pickles that we know.

    Raises ValueError for any other pickle, and OSError.
    """
    folder = Path(source)
    if folder.is_dir():
        file = folder / PICKLE
        # Of neither: the library says what it misses.
        if any(folder.glob("*.safetensors")) or not file.is_file():
            return True
    elif model.pickled:
        file = Path(hf_hub_download(source, PICKLE, revision=model.revision))
    else:
        return True
    pickled.check(file, KNOWN_PICKLES, "the files that the catalogue knows")
    return False


def _config(model: Model, source: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, **hub_options(model))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineLoadError(reason(model, source, error, PARTS)) from error
    if config.model_type not in ENCODERS or getattr(config, "is_decoder", False):
        raise EngineLoadError(
            f"{model.id} ({source}) is a {config.model_type} model, and vectors are made by encoders: "
            f"{', '.join(sorted(ENCODERS))}. Set GPU_EMBEDDING_MODEL to one of those."
        )
    return config


def _need(config: Any, dtype: torch.dtype, tokens: int) -> Need:
    """What weights and one pass take. tokens: of a pass; a single text may have more, and is one by itself."""
    tokens = max(tokens, getattr(config, "max_position_embeddings", None) or 0)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # One layer at a time: the stream and its copy, queries, keys, values and their sum, and the wide layer before and
    # after its activation. Then the last one in float32, and masked.
    each = (6 * config.hidden_size + 2 * wide) * dtype.itemsize + 2 * config.hidden_size * 4
    return replace(
        need_of(config, dtype, AutoModel), working_bytes=each * tokens, working=f"activations of {tokens} tokens"
    )


def _check(model: Model, source: str, network: Any, tokenizer: Any, missing: list[str]) -> None:
    """Refuse what would compute, but nonsense: transformers makes up what a checkpoint lacks."""
    # Made up when all tokenizer files are missing: one of the special tokens alone.
    if not tokenizer.is_fast or (Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file()):
        raise EngineLoadError(f"{model.id} ({source}) has no tokenizer.json: copy or convert it once.")
    known = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise EngineLoadError(
            f"The tokenizer of {model.id} ({source}) has {len(tokenizer)} tokens and its encoder knows {known}: they "
            "belong to different models."
        )
    # The pooler is for next sentence prediction; many checkpoints leave it out, and nothing here reads it.
    if lost := sorted(name for name in missing if not name.startswith("pooler.")):
        raise EngineLoadError(
            f"{model.id} ({source}) lacks {len(lost)} of its encoder's weights, among them {lost[0]}: the files are of "
            "another model, or incomplete."
        )


def _positions(network: Any) -> int | None:
    """How many tokens of a text the encoder has positions for; None where it states no number."""
    table = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
    if table is None:
        return getattr(network.config, "max_position_embeddings", None)
    # RoBERTa and its kind count from behind the number of the padding token.
    return int(table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)


def _layout(model: Model) -> _Layout:
    """What a local folder says of itself; a model of the catalogue is known.

    Source: sentence-transformers, Transformer.load, Pooling.load, SentenceTransformer.encode_query and encode_document.
    """
    source = locate(model)
    modules = Path(source) / "modules.json"
    if model.sentence or not modules.is_file():
        return _Layout(source)
    try:
        listed = [(module["type"].rpartition(".")[2], Path(source) / module["path"]) for module in _json(modules)]
        kinds = [kind for kind, _ in listed]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise EngineLoadError(
                f"{model.id} ({source}) is made of {', '.join(kinds)} (modules.json); only Transformer, Pooling and "
                "Normalize are computed here."
            )
        encoder, pooling = listed[0][1], listed[1][1]
        reading = _json(encoder / "sentence_bert_config.json")
        prompts = _json(Path(source) / "config_sentence_transformers.json")
        sentence = Sentence(
            _pooling(model, _json(pooling / "config.json")),
            # 0: as long as the tokenizer and the encoder can do.
            reading.get("max_seq_length") or 0,
            _prompt(prompts, "query"),
            _prompt(prompts, "document", "passage", "corpus"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineLoadError(
            f"{model.id} ({source}): the files of sentence-transformers cannot be understood: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _Layout(str(encoder), sentence, bool(reading.get("do_lower_case")))


def _json(path: Path) -> Any:
    """A JSON file, or nothing where there is none: all of these may be left out."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _pooling(model: Model, config: Mapping[str, Any]) -> Pooling:
    """The one way to pool that the folder asks for; the mean where it says nothing."""
    newer = config.get("pooling_mode")
    flags = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    if newer:
        modes = [newer] if isinstance(newer, str) else list(newer)
    else:
        modes = [flags.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if modes and modes not in (["cls"], ["mean"]):
        raise EngineLoadError(f"{model.id} pools by {', '.join(modes)}; only cls or mean is computed here.")
    if config.get("include_prompt") is False:
        raise EngineLoadError(f"{model.id} leaves its prompts out of the pooling, which is not computed here.")
    return Pooling(modes[0]) if modes else Pooling.MEAN


def _prompt(config: Mapping[str, Any], *names: str) -> str:
    """The first of those prompts that the folder has, else its default."""
    prompts = config.get("prompts") or {}
    wanted = next((name for name in names if name in prompts), config.get("default_prompt_name"))
    return prompts.get(wanted) or ""
