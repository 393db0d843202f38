"""What a worker reads of a model: safetensors at the commit that was named, and no code unless the operator says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engines.catalogue import JobType, UnknownModel, find
from engines.contract import Device, EngineLoadError
from engines.loading import hub_options, load, locate, resolve
from tests.engines import tiny_embedding, tiny_image_gen, tiny_vision

CPU = Device("cpu", dtype="float32")
PINNED_AT = find(JobType.LLM, "HuggingFaceTB/SmolLM2-135M-Instruct").revision
COMMIT, OTHER = "a" * 40, "b" * 40
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Leaves a file behind when it is imported.
CODE = "import pathlib\npathlib.Path({path!r}).touch()\n"


@pytest.fixture(scope="module")
def folder_of(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[JobType], Path]:
    """Tiny models that load, one of each type that reads a folder by a library."""

    def build(job_type: JobType) -> Path:
        folder = tmp_path_factory.mktemp("model") / "tiny"
        if job_type is JobType.LLM:
            shutil.copytree(checkpoint("llama"), folder)
        elif job_type is JobType.EMBEDDING:
            tiny_embedding.bert(folder)
        elif job_type is JobType.VISION:
            tiny_vision.build(next(iter(tiny_vision.FAMILIES)), folder)
        else:
            tiny_image_gen.build(next(iter(tiny_image_gen.FAMILIES)), folder)
        return folder

    return build


READ = (JobType.LLM, JobType.EMBEDDING, JobType.VISION, JobType.IMAGE_GEN)


@pytest.mark.parametrize("job_type", READ)
def test_pickled_weights_are_refused_with_what_the_folder_must_hold(
    folder_of: Callable[[JobType], Path], job_type: JobType
) -> None:
    folder = folder_of(job_type)
    for file in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()

    with pytest.raises(EngineLoadError, match="safetensors"):
        load(resolve(job_type, str(folder)), CPU)


@pytest.mark.parametrize("job_type", [JobType.LLM, JobType.EMBEDDING, JobType.VISION])
def test_code_that_a_config_names_is_not_run(
    folder_of: Callable[[JobType], Path], tmp_path: Path, job_type: JobType
) -> None:
    folder, ran = folder_of(job_type), tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(path=str(ran)))
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            stated = json.loads((folder / name).read_text())
            stated["auto_map"] = {**names, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
            # Of no library: then only its own code could read it.
            stated |= {"model_type": "evil"} if name == "config.json" else {}
            (folder / name).write_text(json.dumps(stated))

    with pytest.raises(EngineLoadError):
        load(resolve(job_type, str(folder)), CPU)

    assert not ran.exists()


@pytest.mark.parametrize("part", ["pipeline", "component"])
def test_code_that_a_pipeline_names_is_not_run(folder_of: Callable[[JobType], Path], tmp_path: Path, part: str) -> None:
    folder, ran = folder_of(JobType.IMAGE_GEN), tmp_path / "ran"
    index = json.loads((folder / "model_index.json").read_text())
    if part == "pipeline":
        index["_class_name"] = ["evil", "Evil"]
        (folder / "evil.py").write_text(CODE.format(path=str(ran)))
    else:
        index["vae"] = ["evil", "Evil"]
        (folder / "vae" / "evil.py").write_text(CODE.format(path=str(ran)))
    (folder / "model_index.json").write_text(json.dumps(index))

    with pytest.raises(EngineLoadError):
        load(resolve(JobType.IMAGE_GEN, str(folder)), CPU)

    assert not ran.exists()


def test_a_commit_behind_the_id_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve(JobType.LLM, f"{SMOLLM2}@{COMMIT}")
    # Nobody knows of which commit these are.
    monkeypatch.setattr("engines.packaged.prepared", lambda name: tmp_path)

    assert (model.id, locate(model)) == (SMOLLM2, SMOLLM2)
    assert hub_options(model) == {"revision": COMMIT, "trust_remote_code": False}
    with pytest.raises(UnknownModel):
        resolve(JobType.LLM, f"{SMOLLM2}@{COMMIT[:12]}")
    assert hub_options(resolve(JobType.LLM, f"{SMOLLM2}@main")) == {"trust_remote_code": False}


def test_code_is_trusted_at_the_listed_commit_alone() -> None:
    listed = [f"{SMOLLM2}@{COMMIT}"]

    assert hub_options(resolve(JobType.LLM, SMOLLM2)) == {"revision": PINNED_AT, "trust_remote_code": False}
    assert hub_options(resolve(JobType.LLM, SMOLLM2, listed)) == {"revision": COMMIT, "trust_remote_code": True}
    assert not resolve(JobType.LLM, "Qwen/Qwen2.5-7B-Instruct", listed).trusted
    with pytest.raises(UnknownModel, match="GPU_TRUST_REMOTE_CODE"):
        resolve(JobType.LLM, f"{SMOLLM2}@{OTHER}", listed)
