"""A small real server in ComfyUI's place: main.py with the same command line, its state, and workflows."""

import argparse
import os
import platform
import sys
from pathlib import Path

from tests.gpu_admin import comfyui_queue, stand_in

FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")


class Handler(stand_in.Handler):
    """ComfyUI's answers. Every route is also there under /api."""

    queue: comfyui_queue.Queue

    def do_GET(self) -> None:  # noqa: N802
        """The server's state, and that of workflows."""
        path = self.path.removeprefix("/api")
        if path == "/system_stats":
            self.answer({"system": system(), "devices": [DEVICE]})
        elif not comfyui_queue.get(self, self.queue, path):
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802 - named by BaseHTTPRequestHandler
        """Workflows."""
        if not comfyui_queue.post(self, self.queue, self.path.removeprefix("/api")):
            self.answer({}, 405)


DEVICE = {
    "name": "cpu",
    "type": "cpu",
    "index": None,
    "vram_total": 0,
    "vram_free": 0,
    "torch_vram_total": 0,
    "torch_vram_free": 0,
}


def system() -> dict[str, object]:
    """The `system` of /system_stats."""
    return {
        "os": os.name,
        "ram_total": 0,
        "ram_free": 0,
        "comfyui_version": "0.3.64",
        "python_version": sys.version,
        "pytorch_version": "2.13.0+cpu",
        "embedded_python": False,
        "argv": sys.argv,
        "platform": platform.platform(),
    }


def parser() -> argparse.ArgumentParser:
    """ComfyUI's options, as far as they are used here; one that it does not know ends it, as there."""
    options = argparse.ArgumentParser()
    options.add_argument("--listen", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8188)
    options.add_argument("--disable-auto-launch", action="store_true")
    options.add_argument("--disable-api-nodes", action="store_true")
    options.add_argument("--base-directory")
    options.add_argument("--output-directory")
    options.add_argument("--temp-directory")
    options.add_argument("--preview-method", choices=["none", "auto", "latent2rgb", "taesd"])
    options.add_argument("--reserve-vram", type=float)
    memory = options.add_mutually_exclusive_group()
    for mode in ("gpu-only", "highvram", "normalvram", "lowvram", "novram", "cpu"):
        memory.add_argument(f"--{mode}", action="store_true")
    return options


def main() -> None:
    """`python main.py ...`."""
    args = parser().parse_args()
    stand_in.obey()
    if args.base_directory:
        for name in FOLDERS:
            if not (Path(args.base_directory) / name).is_dir():
                raise FileNotFoundError(f"{args.base_directory}/{name}")
    Handler.queue = comfyui_queue.Queue(Path(args.base_directory or Path(sys.argv[0]).parent))
    stand_in.serve(args.listen, args.port, Handler)
