import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from engines import packaged
from engines.catalogue import DEFAULT_ON_CPU, DEFAULT_ON_GPU, MODELS, JobType, Model, UnknownModel, find
from engines.contract import Device, EngineLoadError
from engines.loading import check_kernels, detect_device, load, locate, pick_dtype, resolve
from tests.engines.hub import serving

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CPU = Device("cpu", dtype="float32")


# --- names


def test_an_alias_resolves_to_the_model_that_runs_instead() -> None:
    assert resolve(JobType.LLM, "THUDM/glm-4-9b-chat").id == "zai-org/glm-4-9b-chat-hf"


def test_a_local_folder_is_a_model_of_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()

    model = resolve(JobType.LLM, str(tmp_path / "my-model"))

    assert (model.id, model.engine) == ("my-model", "engines.llm.engine:Engine")
    assert locate(model) == str(tmp_path / "my-model")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownModel, match=r"Qwen/Qwen2\.5-7B-Instruct.*no local folder"):
        resolve(JobType.LLM, "Qwen/Qwen2.5-7B")


def test_no_default_is_the_echo_engine_and_every_default_is_in_the_catalogue() -> None:
    defaults = {*DEFAULT_ON_CPU.values(), *DEFAULT_ON_GPU.values()}

    assert defaults <= {model.id for model in MODELS} - {"echo"}


# --- where weights come from


def test_packaged_weights_are_used_once_they_are_prepared_and_the_hub_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_MODEL_DIR", str(tmp_path))
    model = resolve(JobType.LLM, SMOLLM2)
    before = locate(model)

    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    half_done = locate(model)
    (folder / packaged.SOURCE).write_text(f'{{"sha256": "{packaged.PACKAGES[folder.name].sha256}"}}')

    assert before == half_done == SMOLLM2
    assert locate(model) == str(folder)


def test_weights_are_asked_for_at_hf_endpoint_and_its_refusal_says_what_to_set(tmp_path: Path) -> None:
    script = (
        "from engines.loading import *; from engines.contract import *\n"
        "try: load(resolve(JobType.LLM, 'Qwen/Qwen2.5-7B-Instruct'), Device('cpu'))\n"
        "except EngineLoadError as error: print(error)"
    )
    with serving({}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )

    commit = find(JobType.LLM, "Qwen/Qwen2.5-7B-Instruct").revision
    assert ("Qwen/Qwen2.5-7B-Instruct", commit, "config.json") in hub.asked
    assert f"Qwen/Qwen2.5-7B-Instruct cannot be loaded from {hub.url}" in done.stdout
    assert "Set HF_ENDPOINT" in done.stdout


# --- what cannot be loaded


def test_a_hub_that_cannot_be_reached_names_the_ways_out() -> None:
    # conftest sets HF_HUB_OFFLINE: nothing is asked, nothing is cached.
    with pytest.raises(EngineLoadError, match=r"HF_ENDPOINT.*local folder") as refused:
        load(resolve(JobType.LLM, "Qwen/Qwen2.5-7B-Instruct"), CPU)

    assert refused.value.code == "engine_load_error"


def test_a_gated_model_asks_for_hf_token() -> None:
    with pytest.raises(EngineLoadError, match=r"accept its terms at .*HF_TOKEN"):
        load(resolve(JobType.LLM, "meta-llama/Llama-3.1-8B-Instruct"), CPU)


def test_a_folder_without_a_model_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"config\.json"):
        load(resolve(JobType.LLM, str(tmp_path)), CPU)


def test_a_base_model_without_a_chat_template_is_refused_at_load(checkpoint: Any, tmp_path: Path) -> None:
    source, folder = checkpoint("qwen2"), tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)

    with pytest.raises(EngineLoadError, match="no chat template"):
        load(resolve(JobType.LLM, str(folder)), CPU)


def test_an_engine_path_that_leads_nowhere_names_the_model() -> None:
    with pytest.raises(EngineLoadError, match=r"odd could not be loaded.*engines\.nowhere"):
        load(Model("odd", JobType.LLM, "engines.nowhere:Engine"), CPU)


def test_a_model_that_does_not_fit_shows_the_arithmetic_and_what_would_help(tiny_model: Any) -> None:
    with pytest.raises(EngineLoadError) as refused:
        load(tiny_model("qwen2"), Device("cpu", dtype="float32", max_memory_gib=0.001))

    assert "weights 0.00 GiB + a cache of 4096 tokens" in refused.value.message
    assert "capped by max_memory_gib=0.001" in refused.value.message
    assert "raise max_memory_gib" in refused.value.message


# --- devices


def test_without_a_gpu_the_device_is_the_cpu_and_float32_unless_it_has_bfloat16() -> None:
    device = detect_device(0, "auto", max_memory_gib=4)

    assert device == Device("cpu", "auto", 4)
    assert pick_dtype(device) in ("float32", "bfloat16")
    assert pick_dtype(Device("cpu", "float16")) == "float16"


def test_a_dtype_that_no_model_computes_in_is_refused() -> None:
    with pytest.raises(EngineLoadError, match="int8"):
        pick_dtype(Device("cpu", "int8"))


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [((8, 9), ["sm_80", "sm_90"]), ((12, 0), ["sm_90", "compute_90"]), ((9, 0), ["sm_90a"]), ((6, 1), ["sm_60"])],
)
def test_a_card_that_torch_has_kernels_for_is_accepted(capability: tuple[int, int], architectures: list[str]) -> None:
    check_kernels("a card", capability, architectures)


@pytest.mark.parametrize(
    ("capability", "architectures"), [((6, 1), ["sm_75", "sm_80", "compute_90"]), ((8, 0), ["sm_86"])]
)
def test_a_card_without_kernels_is_refused_with_the_build_to_install(
    capability: tuple[int, int], architectures: list[str]
) -> None:
    with pytest.raises(EngineLoadError, match=r"GTX 1080.*cu126"):
        check_kernels("NVIDIA GeForce GTX 1080", capability, architectures)
