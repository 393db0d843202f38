"""NVML without a GPU: a stub of NVIDIA's library, compiled from nvml_stub.c, that says what a test wrote.

Child processes load it by `NvmlStub.environ`; in the pytest process the fixture `nvml` (conftest.py) preloads it. With
no stub written for it a process that has it loaded finds no driver.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import missing

SOURCE = Path(__file__).with_name("nvml_stub.c")
SONAME = "libnvidia-ml.so.1"

#: What NVML's functions return; `fail` of NvmlStub.write takes them.
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
VERSION_MISMATCH = 18
UNKNOWN = 999


@dataclass(frozen=True)
class Card:
    """A GPU of the stub."""

    name: str = "NVIDIA GeForce RTX 4090"
    total_mib: int = 24_576
    #: None: the sum of what its processes hold.
    used_mib: int | None = None
    power_w: float = 150.7
    utilization_percent: int = 37
    temperature_c: int = 61


@dataclass(frozen=True)
class Held:
    """What a process holds on a GPU of the stub."""

    pid: int
    #: None: the driver does not say.
    memory_mib: int | None = 4096
    gpu: int = 0
    #: compute or graphics.
    kind: str = "compute"


class NvmlStub:
    """A host's GPUs as NVML shows them; `write` changes them, for processes that have loaded it too."""

    def __init__(self, folder: Path) -> None:
        """One GPU with nothing on it. Skips the test where there is no C compiler, and fails it in CI."""
        self.library = _library()
        self.state = folder / "nvml-state"
        self.write([Card()])

    @property
    def environ(self) -> dict[str, str]:
        """What a child process needs beside its own environment."""
        known = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": os.pathsep.join([str(self.library.parent), *([known] if known else [])]),
            "NVML_STUB_STATE": str(self.state),
        }

    def preload(self) -> None:
        """Let this process find it in place of the driver's library, for as long as it lives.

        It says nothing until the variable NVML_STUB_STATE is set, which C sees through os.environ.
        """
        # Once a library of that name is loaded, every later CDLL of the name finds it.
        ctypes.CDLL(str(self.library), ctypes.RTLD_GLOBAL)

    def write(
        self,
        gpus: Sequence[Card] = (),
        processes: Sequence[Held] = (),
        fail: Mapping[str | tuple[str, int], int] | None = None,
        hang: Sequence[str] = (),
    ) -> None:
        """What there is from now on.

        fail: what a function returns instead, by its name or by name and GPU: {("nvmlDeviceGetPowerUsage", 1): 3}.
        hang: functions that do not return until the next write.
        """
        lines = [f"hang {function}" for function in hang]
        for index, card in enumerate(gpus):
            used = sum(held.memory_mib or 0 for held in processes if held.gpu == index)
            if card.used_mib is not None:
                used = card.used_mib
            power_mw = round(card.power_w * 1000)
            lines.append(
                f"gpu {card.total_mib} {used} {power_mw} {card.utilization_percent} {card.temperature_c} {card.name}"
            )
        for held in processes:
            memory = -1 if held.memory_mib is None else held.memory_mib
            lines.append(f"process {held.gpu} {held.kind} {held.pid} {memory}")
        for where, code in (fail or {}).items():
            function, gpu = (where, -1) if isinstance(where, str) else where
            lines.append(f"fail {function} {gpu} {code}")
        # Others may be reading it, or writing it too.
        new = self.state.with_name(f"{self.state.name}.{threading.get_ident()}")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.state)

    def remove_driver(self) -> None:
        """From now on there is no driver."""
        self.state.unlink(missing_ok=True)


def _library() -> Path:
    """The compiled library, in a folder of its own; made once for each version of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"gpu-nvml-stub-{os.getuid()}-{digest}" / SONAME
    if library.exists():
        return library
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        missing("A C compiler (gcc)")
    library.parent.mkdir(mode=0o755, exist_ok=True)
    # Several test processes may make it at once.
    new = library.with_name(f"{os.getpid()}.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", f"-Wl,-soname,{SONAME}", "-o", new, SOURCE], check=True)
    new.replace(library)
    return library
