"""The users' path: weights come from a hub, by the catalogue's ids, at its commits."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engines.catalogue import MODELS, JobType, find
from tests.engines import tiny_embedding, tiny_image_gen, tiny_vision, tiny_whisper
from tests.engines.hub import Hub, serving

ROOT = Path(__file__).resolve().parent.parent.parent

#: Loads what it is told, in one process since the libraries take long to import. A loaded engine has computed.
LOADS = """
import json, sys
from engines.catalogue import JobType
from engines.contract import Device, EngineLoadError
from engines.embedding import sentences
from engines.loading import load, resolve
told = json.loads(sys.argv[1])
sentences.KNOWN_PICKLES = frozenset(told["known"]) or sentences.KNOWN_PICKLES
for job_type, name in told["models"]:
    try:
        load(resolve(JobType(job_type), name), Device("cpu", dtype="float32")).close()
        print(json.dumps("loaded"))
    except EngineLoadError as error:
        print(json.dumps(str(error)))
"""


def pickle_weights(folder: Path) -> str:
    """Turn a folder's safetensors into the pickle that older repositories hold; its SHA-256."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    torch.save(load_file(safe), pickled)
    safe.unlink()
    return hashlib.sha256(pickled.read_bytes()).hexdigest()


def loaded(hub: Hub, cache: Path, models: list[tuple[JobType, str]], known: list[str]) -> list[str]:
    """What came of loading each, in a fresh process with an empty cache."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GPU_"))}
    run = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps({"models": models, "known": known})],
        cwd=ROOT,
        env={**environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith('"')]


@pytest.fixture(scope="module")
def repositories(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[str, Path]]:
    """Tiny models under the ids of the seed's choices or their kin, at the catalogue's commits."""
    folder = tmp_path_factory.mktemp("hub")
    made = {
        "Qwen/Qwen2.5-7B-Instruct": checkpoint("qwen2"),
        "Tongyi-MAI/Z-Image-Turbo": tiny_image_gen.build("z_image", folder / "picture"),
        "Qwen/Qwen2-VL-7B-Instruct": tiny_vision.build("qwen2_vl", folder / "vision"),
        "openai/whisper-large-v3": tiny_whisper.build(folder / "whisper"),
        "BAAI/bge-m3": tiny_embedding.xlm_roberta(folder / "embedding"),
    }
    rows = {row.id: row for row in MODELS}
    return {name: (rows[name].revision or "", where) for name, where in made.items()}


def test_every_type_loads_from_the_hub_at_the_catalogues_commit_and_at_no_other(repositories, tmp_path):
    known = pickle_weights(repositories["BAAI/bge-m3"][1])
    models = [(row.type, row.id) for row in MODELS if row.id in repositories]

    with serving(repositories) as hub:
        assert loaded(hub, tmp_path / "cache", models, [known]) == ["loaded"] * len(models)
        # The same file, where nobody knows it.
        (said,) = loaded(hub, tmp_path / "cache", [(JobType.EMBEDDING, "BAAI/bge-m3")], [])

    assert f"sha256 is {known}" in said
    assert {(name, revision) for name, revision, _ in hub.asked} == {
        (name, commit) for name, (commit, _) in repositories.items()
    }
    asked = {path for name, _, path in hub.asked if name != "BAAI/bge-m3"}
    assert not [path for path in asked if path.endswith((".bin", ".pt", ".py"))]


def test_what_is_loaded_by_default_has_a_commit_but_for_one():
    unpinned = {row.id for row in MODELS if "/" in row.id and row.revision is None}

    assert unpinned == {"01-ai/Yi-34B-Chat", "zai-org/GLM-4.1V-9B-Thinking", "llava-hf/llava-v1.6-34b-hf"}
    assert find(JobType.EMBEDDING, "BAAI/bge-m3").pickled
