"""A ComfyUI to run workflows on: the program in its place, or the checkout that COMFYUI_DIRECTORY names."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import requests

from tests.gpu_admin import stand_in
from tests.gpu_admin.comfyui_program import FOLDERS
from tests.rig import free_port, until

#: With COMFYUI_PYTHON for its interpreter, whose environment has what ComfyUI needs.
REAL = os.environ.get("COMFYUI_DIRECTORY")


class ComfyUi:
    """One server process, with a base folder and a port of its own."""

    def __init__(self, folder: Path, era: str = "", port: int | None = None) -> None:
        """era: see comfyui_queue; the real one has its own."""
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        if REAL:
            python, main = os.environ.get("COMFYUI_PYTHON", sys.executable), Path(REAL) / "main.py"
        else:
            python, main = sys.executable, folder / "main.py"
            main.write_text(stand_in.script("tests.gpu_admin.comfyui_program"))
        options = ["--cpu", "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(folder)]
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [python, str(main), "--listen", "127.0.0.1", "--port", str(self.port), *options],
                cwd=main.parent,
                env={**os.environ, "COMFYUI_ERA": era},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            until(self._answers, 120 if REAL else 20)
        except AssertionError:
            self.kill()
            raise

    def get(self, path: str) -> Any:
        """What another client of it is told."""
        return requests.get(self.url + path, timeout=5).json()

    def post(self, path: str, **said: Any) -> requests.Response:
        """What another client of it does."""
        return requests.post(self.url + path, json=said, timeout=5)

    def statuses(self) -> dict[str, list[str]]:
        """The last events of the prompts that have ended, by prompt id."""
        return {
            prompt_id: [event for event, _ in entry["status"]["messages"]]
            for prompt_id, entry in self.get("/history").items()
        }

    def running(self) -> list[str]:
        """Ids of the prompts that run."""
        return [entry[1] for entry in self.get("/queue")["queue_running"]]

    def waiting(self) -> list[str]:
        """Ids of the prompts that wait."""
        return [entry[1] for entry in self.get("/queue")["queue_pending"]]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return bool(self.get("/system_stats"))
        except requests.RequestException:
            return False


def blurred(nodes: int, color: int) -> dict[str, Any]:
    """A workflow of so many slow nodes; a color of its own keeps it out of ComfyUI's cache."""
    # Real ones blur by real arithmetic: of this size a node takes some tenths of a second on a CPU.
    side = 1024 if REAL else 64
    empty = {"width": side, "height": side, "batch_size": 1, "color": color}
    chain = {
        f"b{n}": {
            "class_type": "ImageBlur",
            "inputs": {"image": [f"b{n - 1}" if n else "empty", 0], "blur_radius": 8, "sigma": 1.0},
        }
        for n in range(nodes)
    }
    return {
        "empty": {"class_type": "EmptyImage", "inputs": empty},
        **chain,
        "save": {"class_type": "SaveImage", "inputs": {"images": [f"b{nodes - 1}", 0], "filename_prefix": "blurred"}},
    }
