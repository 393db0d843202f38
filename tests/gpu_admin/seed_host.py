"""The seed's host for tests of the HTTP edge: GPUs of the stub, and its two models under a small real runner."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_admin.contract import Place, Seen, SupportedModel, Wanted
from gpu_admin.settings import Section, Settings
from tests.gpu_admin import sleepers

PORT = 8000
MODELS = {"MAM": 4, "FastFitAll": 2, "broken": None}
RUNNER = f"{__name__}:Runner"


class Runner(sleepers.Runner):
    """Its servers are `sleep` processes; MAM runs in eight copies on each GPU."""

    name = "triton"

    def __init__(self, section: Mapping[str, Any], place: Place) -> None:
        super().__init__(section, place)
        self.models["MAM"] = SupportedModel("MAM", self.models["MAM"].memory_gib, instances_per_gpu=8)

    def status(self, wanted: Wanted) -> Seen:
        """As they are, on the seed's port."""
        return replace(super().status(wanted), port=PORT, copies=self.models[wanted.model_name].instances_per_gpu)


def settings(folder: Path, **changes: Any) -> Settings:
    """What that host is told; what it keeps is in the folder."""
    told = Settings(folder, {"triton": Section(RUNNER, {"models": MODELS})})
    return replace(told, **changes)


def environ(folder: Path, port: int) -> dict[str, str]:
    """The same for a process of its own, that listens on a port."""
    config = folder / "gpu_admin.yaml"
    config.write_text(json.dumps({"port": port, "triton": {"class": RUNNER, "models": MODELS}}))
    return {"GPU_ADMIN_CONFIG": str(config), "GPU_ADMIN_DATA_DIR": str(folder / "data")}


def hold_starts(folder: Path, model: str) -> Path:
    """Keep the model's starts from ending until that file is removed. folder: the host's data folder."""
    gate = folder / "runners" / "triton" / f"gate-{model}"
    gate.parent.mkdir(parents=True, exist_ok=True)
    gate.touch()
    return gate


def end_servers(folder: Path) -> None:
    """End every server that was started on that data folder."""
    Runner({"models": MODELS}, Place(folder / "runners" / "triton", lambda _gpu, _pids: None)).close()
