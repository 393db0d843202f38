"""CTranslate2's Whisper files (faster-whisper's model.bin) into the hub's layout: config.json, model.safetensors."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engines.contract import EngineLoadError

Arrays = dict[str, NDArray[Any]]

#: The numbers that stand for types of values. Source: OpenNMT/CTranslate2, include/ctranslate2/types.h.
DTYPES: Mapping[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
#: Format versions that are read: since 6, the aliases stand at the end.
VERSIONS = (6,)

#: Where whole modules go, of the encoder and the decoder.
MODULES = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "encoder/position_encodings": "model.encoder.embed_positions",
    "decoder/embeddings": "model.decoder.embed_tokens",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "decoder/position_encodings": "model.decoder.embed_positions",
}
#: And of one layer. One of CTranslate2's may be several of the hub's, one above the other.
LAYER_MODULES = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
VALUES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def convert(model: Path, folder: Path) -> None:
    """Save a CTranslate2 Whisper model the way the hub keeps it.

    Raises EngineLoadError if the file is something else.
    """
    arrays = read(model)
    folder.mkdir(parents=True)
    save_file(state_of(arrays), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(arrays), indent=2))


def read(model: Path) -> Arrays:
    """Everything that a model.bin holds, by CTranslate2's names.

    The file: version, name and revision of the kind of model, the arrays (name, rank, sizes, type, bytes), the aliases
    (not needed: they only say that the last layer is the embedding). Source: OpenNMT/CTranslate2,
    python/ctranslate2/specs/model_spec.py, ModelSpec._serialize. Raises EngineLoadError.
    """
    with model.open("rb") as file:
        try:
            (version,) = _unpack(file, "<I")
            kind, _revision = _name(file), _unpack(file, "<I")
            if version not in VERSIONS or kind != "WhisperSpec":
                raise EngineLoadError(f"{model.name} is a {kind} of version {version}, and no Whisper model of 6.")
            (count,) = _unpack(file, "<I")
            return dict(_array(file) for _ in range(count))
        except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
            raise EngineLoadError(f"{model.name} is no file of CTranslate2, or cut off: {error}") from error


def state_of(arrays: Arrays) -> Arrays:
    """The weights by the hub's names; 8-bit ones as the float32 that they mean."""
    state: Arrays = {}
    for name, array in arrays.items():
        module, _, value = name.rpartition("/")
        targets = _targets(module)
        if not targets or value not in VALUES:
            continue
        if array.dtype == np.int8:
            array = array / arrays[f"{module}/weight_scale"].reshape(-1, *[1] * (array.ndim - 1)).astype(np.float32)
        for target, part in zip(targets, np.split(array, len(targets)), strict=True):
            # Whisper's keys have no bias; CTranslate2 writes zeros beside those of queries and values.
            if not (target.endswith("k_proj") and value == "bias"):
                state[f"{target}.{VALUES[value]}"] = np.ascontiguousarray(part)
    return state


def config_of(arrays: Arrays) -> dict[str, Any]:
    """What WhisperConfig needs to know."""
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": arrays["encoder/conv1/weight"].shape[1],
        "max_source_positions": arrays["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": arrays["decoder/position_encodings/encodings"].shape[0],
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_layers"] = len(
            {name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_")} - {"layer_norm"}
        )
        config[f"{side}_attention_heads"] = int(arrays[f"{side}/num_heads"])
        config[f"{side}_ffn_dim"] = arrays[f"{side}/layer_0/ffn/linear_0/bias"].shape[0]
    return config


def _targets(module: str) -> list[str]:
    """The hub's modules that one of CTranslate2's becomes; none for its settings."""
    if module in MODULES:
        return [MODULES[module]]
    side, _, rest = module.partition("/layer_")
    number, _, part = rest.partition("/")
    return [f"model.{side}.layers.{number}.{name}" for name in LAYER_MODULES.get(part, ())]


def _unpack(file: IO[bytes], form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _name(file: IO[bytes]) -> str:
    (size,) = _unpack(file, "<H")
    # Behind it stands C's end of a string.
    return file.read(size)[:-1].decode()


def _array(file: IO[bytes]) -> tuple[str, NDArray[Any]]:
    name = _name(file)
    (rank,) = _unpack(file, "<B")
    shape = _unpack(file, f"<{rank}I")
    dtype, size = _unpack(file, "<BI")
    return name, np.frombuffer(file.read(size), DTYPES[dtype]).reshape(shape)
