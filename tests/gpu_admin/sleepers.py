"""A small real runner: its servers are `sleep` processes, and files in its folder say how they behave.

`gate-MODEL`: a start of the model waits while it exists. `away`: the backend does not answer.
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from gpu_admin.contract import (
    BadRequest,
    InstanceStatus,
    Place,
    Seen,
    StartFailed,
    SupportedModel,
    Unavailable,
    Wanted,
)


class Runner:
    """Models are in the section with their memory in GiB: {"models": {"small": 1, "broken": None}}."""

    name = "sleepers"

    def __init__(self, section: Mapping[str, Any], place: Place) -> None:
        self.models = {name: SupportedModel(name, memory_gib=gib) for name, gib in section["models"].items()}
        self.folder = place.folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def read_config(self, model_name: str, gpu_id: int, config: Mapping[str, Any]) -> Wanted:
        if set(config) - {"gpus"}:
            raise BadRequest("config: only gpus is known.")
        return Wanted(model_name, (gpu_id, *config.get("gpus", ())), dict(config))

    def check(self, wanted: Wanted) -> None:
        if (self.folder / "away").exists():
            raise Unavailable("The engine is away.")

    def start(self, wanted: Wanted, abandoned: Callable[[], bool]) -> None:
        self._note("entered", wanted)
        if (self.folder / "away").exists():
            raise StartFailed("The engine did not make it.")
        if wanted.model_name == "broken":
            raise StartFailed("Its weights are torn.", ["line 1", "line 2"])
        if wanted.model_name == "odd":
            raise ZeroDivisionError("by a runner with a mistake")
        if self._process(wanted) is None:
            process = subprocess.Popen(["sleep", "600"], start_new_session=True)
            self._pid_file(wanted).write_text(str(process.pid))
            self._note("spawned", wanted)
        while (self.folder / f"gate-{wanted.model_name}").exists() and not abandoned():
            time.sleep(0.1)
        self._note("left", wanted)

    def stop(self, wanted: Wanted) -> None:
        self._note("stopped", wanted)
        if (self.folder / "away").exists():
            raise Unavailable("The engine is away.")
        process = self._process(wanted)
        if process is not None:
            process.kill()
            process.wait(5)

    def status(self, wanted: Wanted) -> Seen:
        process = self._process(wanted)
        if process is None:
            return Seen(InstanceStatus.STOPPED)
        waits = (self.folder / f"gate-{wanted.model_name}").exists()
        status = InstanceStatus.STARTING if waits else InstanceStatus.RUNNING
        return Seen(status, pid=process.pid, pids=frozenset([process.pid]))

    def log(self, wanted: Wanted, tail: int) -> Sequence[str]:
        return [f"{wanted.key} says {number}" for number in range(3)][-tail:]

    def events(self, *kinds: str) -> list[str]:
        """What its methods did, in every process: "spawned small@0"; only of those kinds, if any are named."""
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not kinds or line.split()[0] in kinds]

    def close(self) -> None:
        """End every server."""
        for path in self.folder.glob("*.pid"):
            _end(int(path.read_text()))

    def _note(self, kind: str, wanted: Wanted) -> None:
        with (self.folder / "events").open("a") as file:
            file.write(f"{kind} {wanted.key}\n")

    def _process(self, wanted: Wanted) -> psutil.Process | None:
        try:
            process = psutil.Process(int(self._pid_file(wanted).read_text()))
            # A child that nobody waited for is gone all the same.
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None

    def _pid_file(self, wanted: Wanted) -> Path:
        return self.folder / f"{wanted.key}.pid"


def _end(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        if process.name() == "sleep":
            process.kill()
    except psutil.NoSuchProcess:
        pass
