"""What the contract suite's cases of runners with a process for each instance share."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_admin import proc
from gpu_admin.instances import Instance
from tests.gpu_admin import stand_in
from tests.gpu_admin.cases import Case

MODEL, OTHER, BROKEN = "chane_face", "chane_body", "broken"


def program(path: Path, module: str) -> Path:
    """A program at that path which runs one of these tests' modules."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stand_in.script(module))
    path.chmod(0o755)
    return path


def server_case(
    runner: str, section: Mapping[str, Any], broken_reason: str, *, folder: Path, runner_class: str | None = None
) -> Case:
    """The case of one of these runners; its servers know each other by a variable of their environment."""
    mark = f"CASE_FOLDER={folder}"

    def servers() -> int:
        return sum(process.session == process.pid for process in proc.marked(mark))

    def kill(instance: Instance) -> None:
        assert instance.seen.pid is not None
        os.kill(instance.seen.pid, signal.SIGKILL)

    def close() -> None:
        for process in proc.marked(mark):
            proc.send(process, signal.SIGKILL)

    return Case(
        runner=runner,
        section={
            **section,
            "environment": {"CASE_FOLDER": str(folder)},
            "start_timeout_seconds": section.get("start_timeout_seconds", 30),
            "stop_grace_seconds": 5,
        },
        model=MODEL,
        other=OTHER,
        broken=BROKEN,
        broken_reason=broken_reason,
        kill=kill,
        servers=servers,
        close=close,
        runner_class=runner_class,
    )


def free_ports() -> dict[str, int]:
    """A range of ports for this process's cases. Other programs' ports in it are stepped over."""
    return {"base_port": 20_000 + 100 * (os.getpid() % 120), "ports": 100}
