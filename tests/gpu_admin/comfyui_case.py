"""ComfyUI for the contract suite: a program in its place, or the checkout that COMFYUI_DIRECTORY names."""

import os
from pathlib import Path
from typing import Any

from tests.gpu_admin.cases import Case
from tests.gpu_admin.server_case import BROKEN, MODEL, OTHER, free_ports, program, server_case
from tests.gpu_admin.stand_in import FAILURE


def make_case(folder: Path) -> Case:
    """ComfyUI without a GPU; with COMFYUI_DIRECTORY, and COMFYUI_PYTHON for its interpreter, the real one."""
    real = os.environ.get("COMFYUI_DIRECTORY")
    if real:
        # Real ones differ in nothing but what cannot start: an option that it does not know.
        broken: dict[str, Any] = {"arguments": ["--preview-method", "no-such-method"]}
        reason = "invalid|choose|not a valid"
        checkout = Path(real)
    else:
        broken = {"environment": {"STAND_IN": "fail"}}
        reason = FAILURE.split(":", 1)[1].strip()[:18]
        checkout = program(folder / "ComfyUI" / "main.py", "tests.gpu_admin.comfyui_program").parent
    base = {"base_directory": str(folder / "base")}
    section = {
        "directory": str(checkout),
        "python": os.environ.get("COMFYUI_PYTHON") if real else None,
        "arguments": ["--cpu", "--disable-api-nodes"],
        "supported_models": {MODEL: base, OTHER: base, BROKEN: {**base, **broken}},
        "start_timeout_seconds": 300 if real else 30,
        **free_ports(),
    }
    return server_case("comfyui", section, reason, folder=folder)
