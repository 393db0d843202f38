"""openai-whisper's network from a checkpoint: the hub's layout, or OpenAI's own .pt file.

Order: a local folder, packaged weights that have been prepared, the hub. The hub's safetensors and not OpenAI's own
server, which is where `whisper.load_model("base")` would look: HF_ENDPOINT can name a mirror, and safetensors hold no
code. A .pt file is read only where the operator put it into a local folder, if OpenAI published it (by its sha256), and
without the power to run code (weights_only).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import whisper
from accelerate import init_empty_weights
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from whisper import ModelDimensions, Whisper

from engines import pickled
from engines.catalogue import Model
from engines.contract import Device, EngineLoadError
from engines.loading import locate
from engines.memory import Need, does_not_fit, free_bytes

State = dict[str, torch.Tensor]

#: Of openai-whisper's dimensions, the names that the hub's config.json has for them.
DIMENSIONS = {
    "n_mels": "num_mel_bins",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
#: Parts of the hub's names of weights, and openai-whisper's for them, in the order in which they are looked for.
#: Source: huggingface/transformers, models/whisper/convert_openai_to_hf.py, WHISPER_MAPPING, read backwards.
NAMES = (
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"\.embed_positions\.weight$", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
)
#: The last layer; it is the embedding of tokens once more.
TIED = "proj_out.weight"

WANTED_FILES = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


#: SHA-256 of OpenAI's own files, in hex, as its package states them in their addresses.
PUBLISHED = frozenset(url.split("/")[-2] for url in whisper._MODELS.values())


class DoesNotFit(EngineLoadError):
    """Too large for the device; it may fit into host memory."""


def load(model: Model, device: Device, half: bool) -> Whisper:
    """The network on the device, ready to compute.

    half: float16 for all that openai-whisper would turn into float16 at every call, when it computes in it: the same
    numbers in half the memory. Raises EngineLoadError.
    """
    try:
        dimensions, state = _read(model)
        with init_empty_weights(include_buffers=False):
            network = Whisper(dimensions)
        dtypes = _dtypes(network, half)
        _check_fit(model, device, network, dtypes, half)
        network.load_state_dict(
            {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()}, assign=True
        )
    except (OSError, HfHubHTTPError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EngineLoadError(_reason(model, error)) from error
    return network.to(device.name).eval()


def rename(state: Mapping[str, torch.Tensor]) -> State:
    """Weights with the hub's names, by openai-whisper's."""
    renamed = {}
    for name, value in state.items():
        if name != TIED:
            for pattern, replacement in NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
    return renamed


def _read(model: Model) -> tuple[ModelDimensions, State]:
    folder = Path(locate(model))
    if not folder.is_dir():
        folder = Path(snapshot_download(model.id, revision=model.revision, allow_patterns=WANTED_FILES))
    if files := _safetensors(folder):
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "whisper":
            raise ValueError(f"config.json says model_type {config.get('model_type')!r}, not 'whisper'.")
        state: State = {}
        for file in files:
            state |= load_file(file)
        return ModelDimensions(**{ours: config[theirs] for ours, theirs in DIMENSIONS.items()}), rename(state)
    checkpoints = list(folder.glob("*.pt"))
    if len(checkpoints) != 1:
        raise FileNotFoundError(f"It has {len(checkpoints)} .pt files and no model.safetensors.")
    pickled.check(checkpoints[0], PUBLISHED, "the files that OpenAI published")
    checkpoint = torch.load(checkpoints[0], map_location="cpu", weights_only=True, mmap=True)
    return ModelDimensions(**checkpoint["dims"]), checkpoint["model_state_dict"]


def _safetensors(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def _dtypes(network: Whisper, half: bool) -> dict[str, torch.dtype]:
    """The dtype of each weight. The layers named here cast their weights to that of what they are given."""
    narrow = {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if half and isinstance(module, nn.Linear | nn.Conv1d)
        for name in ("weight", "bias")
    }
    return {name: torch.float16 if name in narrow else torch.float32 for name in network.state_dict()}


def _check_fit(model: Model, device: Device, network: Whisper, dtypes: Mapping[str, torch.dtype], half: bool) -> None:
    weights = sum(value.numel() * dtypes[name].itemsize for name, value in network.state_dict().items())
    need = Need(weights, _window_bytes(network.dims, 2 if half else 4), "one window of 30 s")
    free = free_bytes(device, torch.device(device.name).index or 0)
    if need.bytes > free:
        raise DoesNotFit(does_not_fit(model.id, need, device, {device.name: free}))


def _window_bytes(dims: ModelDimensions, itemsize: int) -> int:
    """What computing one window takes: keys and values of both attentions, the encoder's widest layer, the logits."""
    cache = 2 * dims.n_text_layer * (dims.n_audio_ctx + dims.n_text_ctx) * dims.n_text_state * itemsize
    encoder = 12 * dims.n_audio_ctx * dims.n_audio_state * itemsize
    # For a prompt of half the context, once in the dtype and twice in float32.
    logits = dims.n_text_ctx // 2 * dims.n_vocab * (itemsize + 8)
    return int(cache + encoder + logits)


def _reason(model: Model, error: Exception) -> str:
    """Why a model could not be read, and what to do."""
    said = " ".join(str(error).split())[:400]
    source = locate(model)
    if Path(source).is_dir():
        return (
            f"{model.id} cannot be loaded from {source}: {said} The folder must hold config.json and *.safetensors of "
            "a WhisperForConditionalGeneration, or one .pt file that OpenAI published."
        )
    way = f", run `python -m engines.packaged {model.packaged}`" if model.packaged else ""
    return (
        f"{model.id} cannot be loaded from {constants.ENDPOINT}: {said} Set HF_ENDPOINT to a hub that this host "
        f"reaches{way}, or give the path of a local folder as the model: with the hub's config.json and "
        "model.safetensors, or with a .pt file that OpenAI published."
    )
