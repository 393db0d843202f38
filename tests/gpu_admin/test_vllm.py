"""vLLM: what it is started with, and which requests are refused."""

from pathlib import Path
from typing import Any

import pytest
import requests

from gpu_admin import proc
from gpu_admin.contract import BadRequest, InstanceStatus, Place
from gpu_admin.runners.vllm import Runner
from tests.gpu_admin.server_case import MODEL
from tests.gpu_admin.vllm_case import make_case


def _runner(folder: Path, section: dict[str, Any]) -> Runner:
    return Runner(section, Place(folder, lambda gpu_id, pids: None))


def test_one_server_spans_a_set_of_gpus(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    section = {**case.section, "arguments": ["--enforce-eager"]}
    runner = _runner(tmp_path / "place", section)
    config = {"gpu_ids": [3, 1], "max_model_len": 8192, "dtype": "bfloat16", "gpu_memory_utilization": 0.5}
    try:
        wanted = runner.read_config(MODEL, 3, config)
        runner.check(wanted)
        runner.start(wanted, lambda: False)

        seen = runner.status(wanted)
        started = requests.get(f"http://127.0.0.1:{seen.port}/stand_in", timeout=10).json()
        assert seen.status is InstanceStatus.RUNNING
        assert wanted.gpu_ids == (3, 1)
        assert wanted.key == f"{MODEL}@3"
        assert started["environ"]["CUDA_VISIBLE_DEVICES"] == "1,3"
        assert started["argv"][1:] == [
            *("serve", "Qwen/Qwen2.5-0.5B-Instruct", "--host", "127.0.0.1", "--port", str(seen.port)),
            *("--served-model-name", MODEL, "--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5"),
            *("--max-model-len", "8192", "--dtype", "bfloat16", "--enforce-eager"),
        ]
        runner.stop(wanted)
        assert proc.marked(f"CASE_FOLDER={tmp_path}") == []
    finally:
        case.close()


def test_a_server_with_an_api_key_is_ready_by_its_health(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    section = {**case.section, "supported_models": {MODEL: {"environment": {"VLLM_API_KEY": "secret"}}}}
    runner = _runner(tmp_path / "place", section)
    wanted = runner.read_config(MODEL, 0, {})
    try:
        runner.start(wanted, lambda: False)

        assert runner.status(wanted).status is InstanceStatus.RUNNING
        runner.stop(wanted)
    finally:
        case.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gpu_ids": [1, 2]}, "config.gpu_ids: must name gpu_id 0 as well"),
        ({"gpu_ids": [0, 1, 1]}, "config.gpu_ids: must name each GPU once"),
        ({"gpu_ids": []}, "config.gpu_ids"),
        ({"gpu_ids": [0, -1]}, "config.gpu_ids"),
        ({"max_model_length": 5}, "config.max_model_length: vllm knows no such key. Did you mean max_model_len?"),
        ({"dtype": "int8"}, "config.dtype: Must be one of: auto"),
        ({"gpu_memory_utilization": 1.0}, "config.gpu_memory_utilization: Must be"),
    ],
    ids=["without-its-own", "twice", "none", "negative", "unknown", "dtype", "all-memory"],
)
def test_a_config_that_cannot_be_meant_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    runner = _runner(tmp_path, {"supported_models": [MODEL]})

    with pytest.raises(BadRequest) as refused:
        runner.read_config(MODEL, 0, config)

    assert message in refused.value.detail
