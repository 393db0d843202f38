"""vLLM for the contract suite: a program in its place."""

from pathlib import Path

from tests.gpu_admin.cases import Case
from tests.gpu_admin.server_case import BROKEN, MODEL, OTHER, free_ports, program, server_case


def make_case(folder: Path) -> Case:
    """`vllm serve` without vLLM."""
    section = {
        "program": str(program(folder / "bin" / "vllm", "tests.gpu_admin.vllm_program")),
        "supported_models": {
            MODEL: {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
            OTHER: {"model": "/models/other"},
            BROKEN: {"environment": {"STAND_IN": "fail"}},
        },
        **free_ports(),
    }
    return server_case("vllm", section, "CUDA out of memory", folder=folder)
