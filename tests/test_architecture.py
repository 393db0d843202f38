"""What each process loads, and which way imports go."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL_LIBRARIES = {
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "gguf",
    "diffusers",
    "whisper",
    "soundfile",
    "soxr",
}
#: Of servers that compute for engines; no business of whoever only hands jobs on.
CLIENTS = {"websocket", "tritonclient", "grpc"}


def loaded_by(module: str, folder: Path = ROOT) -> set[str]:
    """The top-level packages that a fresh interpreter in that folder has loaded after importing the module."""
    code = f"import {module}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "kept_out"),
    [
        ("wsgi", {"gpu_admin", "docker", "pynvml"} | MODEL_LIBRARIES | CLIENTS),
        ("app.control", MODEL_LIBRARIES | CLIENTS),
        ("tasks.boot", {"flask", "sqlalchemy", "app"} | MODEL_LIBRARIES | CLIENTS),
        ("tasks.launch", {"flask", "sqlalchemy", "app"} | MODEL_LIBRARIES),
        ("local.up", MODEL_LIBRARIES),
        ("gpu_admin", {"flask", "psutil", "yaml", "docker", "pynvml"} | MODEL_LIBRARIES | CLIENTS),
        # Docker's SDK comes with the Triton runner, where that is used.
        ("gpu_admin.web", {"app", "tasks", "engines", "celery", "docker"} | MODEL_LIBRARIES | CLIENTS),
    ],
)
def test_a_process_loads_no_more_than_it_needs(module: str, kept_out: set[str]) -> None:
    assert loaded_by(module) & kept_out == set()


def test_the_sdk_is_one_file_that_can_be_copied(tmp_path: Path) -> None:
    shutil.copy(ROOT / "app" / "client.py", tmp_path / "client.py")

    loaded = loaded_by("client", tmp_path)

    assert "client" in loaded
    assert loaded & {"app", "tasks", "engines", "flask", "celery", "redis", "marshmallow"} == set()


def test_the_command_line_needs_no_server(tmp_path: Path) -> None:
    shutil.copy(ROOT / "gpuctl", tmp_path / "gpuctl.py")
    (tmp_path / "app").mkdir()
    for name in ("__init__.py", "client.py"):
        shutil.copy(ROOT / "app" / name, tmp_path / "app" / name)
    shutil.copytree(ROOT / "app" / "cli", tmp_path / "app" / "cli")
    code = "import sys; sys.argv = ['gpuctl', '--help']; import atexit; "
    code += "atexit.register(lambda: print('loaded', *sys.modules)); import gpuctl"

    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    loaded = set(done.stdout.rpartition("loaded")[2].split())
    assert "app.cli.commands" in loaded
    assert loaded & {"flask", "celery", "redis", "marshmallow", "sqlalchemy", "torch", "tasks", "engines"} == set()


def test_imports_go_downwards_only() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
