"""The worked example of docs/runners.md for the contract suite, as an operator would add it."""

from pathlib import Path

from tests.gpu_admin.cases import Case
from tests.gpu_admin.server_case import BROKEN, MODEL, OTHER, free_ports, program, server_case


def make_case(folder: Path) -> Case:
    """llama-server without llama.cpp."""
    for name, head in ((MODEL, b"GGUF"), (OTHER, b"GGUF"), (BROKEN, b"PK\3\4")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.gguf").write_bytes(head)
    section = {
        "program": str(program(folder / "bin" / "llama-server", "tests.gpu_admin.llama_program")),
        "supported_models": {name: {"path": str(folder / f"{name}.gguf")} for name in (MODEL, OTHER, BROKEN)},
        **free_ports(),
    }
    return server_case(
        "llama",
        section,
        "model loading error",
        folder=folder,
        runner_class="docs.examples.llama_server:Runner",
    )
