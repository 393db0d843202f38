"""ComfyUI: what it is started with, when it is ready, and which requests are refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from gpu_admin.contract import BadRequest, InstanceStatus, Place, Wanted
from gpu_admin.runners.comfyui import Runner
from tests.gpu_admin.comfyui_case import make_case
from tests.gpu_admin.server_case import MODEL, program


def _runner(folder: Path, section: dict[str, Any]) -> Runner:
    return Runner(section, Place(folder, lambda gpu_id, pids: None))


def test_an_instance_has_pictures_and_temporary_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMFYUI_DIRECTORY", raising=False)
    case = make_case(tmp_path)
    runner = _runner(tmp_path / "place", {**case.section, "arguments": ["--preview-method", "auto"]})
    try:
        wanted = runner.read_config(MODEL, 1, {"lowvram": True, "reserve_vram_gib": 1.5})
        runner.check(wanted)
        runner.start(wanted, lambda: False)

        seen = runner.status(wanted)
        started = requests.get(f"http://127.0.0.1:{seen.port}/stand_in", timeout=10).json()
        own = tmp_path / "place" / f"{MODEL}@1"
        assert seen.status is InstanceStatus.RUNNING
        assert started["cwd"] == str(tmp_path / "ComfyUI")
        assert started["environ"]["CUDA_VISIBLE_DEVICES"] == "1"
        assert started["argv"] == [
            *("main.py", "--listen", "127.0.0.1", "--port", str(seen.port), "--disable-auto-launch"),
            *("--base-directory", str(tmp_path / "base"), "--output-directory", str(own / "output")),
            *("--temp-directory", str(own), "--lowvram", "--reserve-vram", "1.5", "--preview-method", "auto"),
        ]
        runner.stop(wanted)
        assert case.servers() == 0
    finally:
        case.close()


def test_the_checkouts_own_interpreter_is_taken(tmp_path: Path) -> None:
    section = {"directory": str(tmp_path), "supported_models": [MODEL]}
    wanted = Wanted(MODEL, (0,))

    before = _runner(tmp_path, section).command(wanted, 8188)[0]
    own = program(tmp_path / "venv" / "bin" / "python", "nothing")
    after = _runner(tmp_path, section).command(wanted, 8188)[0]

    assert before == sys.executable
    assert after == str(own)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "comfyui.directory: set it"),
        ({"directory": "/no/such"}, "comfyui.directory: there is no folder /no/such"),
        ({"directory": "/"}, "comfyui.directory: / is no ComfyUI"),
        ({"python": "/no/python"}, "comfyui.python: /no/python is not there"),
    ],
    ids=["unset", "missing", "other", "python"],
)
def test_what_is_missing_is_named_with_its_setting(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    if "python" in section:
        section = {**section, "directory": str(program(tmp_path / "main.py", "nothing").parent)}
    runner = _runner(tmp_path / "place", {"supported_models": [MODEL], **section})

    with pytest.raises(BadRequest, match=message):
        runner.check(Wanted(MODEL, (0,)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"low_vram": True}, "config.low_vram: comfyui knows no such key. Did you mean lowvram"),
        ({"lowvram": True, "cpu": True}, "config.cpu: only one of lowvram, cpu can be true"),
        ({"lowvram": "--cpu"}, "config.lowvram: Not a valid boolean"),
        ({"reserve_vram_gib": -1}, "config.reserve_vram_gib: Must be"),
    ],
    ids=["unknown", "two", "no-boolean", "negative"],
)
def test_a_config_that_cannot_be_meant_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    runner = _runner(tmp_path, {"supported_models": [MODEL]})

    with pytest.raises(BadRequest) as refused:
        runner.read_config(MODEL, 0, config)

    assert message in refused.value.detail
