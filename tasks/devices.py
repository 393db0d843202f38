"""The devices of this host, and how a process is kept to one of them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pynvml

from tasks.options import SettingsError

#: How CUDA names a device by UUID instead of by number.
UUID_PREFIXES = ("GPU-", "MIG-")


@dataclass(frozen=True, slots=True)
class Seat:
    """One device for one worker process."""

    #: What its worker is named after: gpu0, cpu.
    label: str
    #: CUDA_VISIBLE_DEVICES of that process; empty hides every GPU.
    visible: str

    @property
    def environ(self) -> Mapping[str, str]:
        """What keeps a process here. Its GPU is the only one it sees, and so its first."""
        return {
            # The order of NVML and nvidia-smi; CUDA's own puts the fastest first.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": self.visible,
            # null: whatever config.yaml says does not hold here.
            "GPU_DEVICE_ID": "0" if self.visible else "null",
        }


def count_gpus() -> int:
    """How many NVIDIA GPUs this host has; 0 where there is no driver.

    Raises SettingsError for a driver that is there and does not work: its GPUs would be left idle in silence.
    """
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return 0
    except pynvml.NVMLError as error:
        raise SettingsError(
            f"The NVIDIA driver does not work: {error}. Does nvidia-smi? To run without GPUs: --devices cpu."
        ) from error
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def visible_to(environ: Mapping[str, str], gpus: int) -> list[str]:
    """The GPUs that a process with this environment may use, as CUDA_VISIBLE_DEVICES names them.

    gpus: how many the host has; 0 where nobody can tell.
    """
    limit = environ.get("CUDA_VISIBLE_DEVICES")
    if limit is None:
        return [str(number) for number in range(gpus)]
    found = []
    for entry in map(str.strip, limit.split(",")):
        # CUDA reads up to the first entry that is none.
        if not entry.startswith(UUID_PREFIXES) and (not entry.isdecimal() or (gpus and int(entry) >= gpus)):
            break
        found.append(entry)
    return found


def choose(asked: str | None, device_id: int | None, visible: Sequence[str]) -> list[Seat]:
    """A seat for each device that gets a worker.

    asked: --devices, such as "0,1", "all", "cpu" or a UUID; numbers count among the visible ones. None means the one
    with number device_id, else every visible GPU, else the CPU. Where nothing is visible a number is taken as told:
    NVML does not see every GPU that torch does. Raises SettingsError for what is not there or is named twice.
    """
    option = "--devices"
    if asked is None and device_id is not None:
        option, asked = "GPU_DEVICE_ID", str(device_id)
    if asked is None or (option == "GPU_DEVICE_ID" and not visible):
        asked = "all" if visible else "cpu"
    words = [word for word in map(str.strip, asked.split(",")) if word]
    if not words:
        raise SettingsError("--devices: name at least one, such as --devices 0,1.")
    entries = [entry for word in words for entry in _entries(word, visible, option)]
    # One process holds its engines once, and its threads are their slots: a second one would only load them again.
    if twice := [entry for entry, times in Counter(filter(None, entries)).items() if times > 1]:
        raise SettingsError(f"--devices: GPU {twice[0]} is named twice; one process uses all of it.")
    return [Seat(label, entry) for label, entry in zip(_labels(entries), entries, strict=True)]


def _entries(word: str, visible: Sequence[str], option: str) -> list[str]:
    """What one word stands for, as CUDA_VISIBLE_DEVICES names it; empty for the CPU."""
    if word == "cpu":
        return [""]
    if word == "all":
        if not visible:
            raise SettingsError("--devices all: this host shows no GPU. To run without one: --devices cpu.")
        return list(visible)
    if word.startswith(UUID_PREFIXES):
        return [word]
    if not word.isdecimal():
        raise SettingsError(f"--devices: {word!r} is no device. Name GPUs by number, such as 0,1; or all, or cpu.")
    number = int(word)
    if not visible:
        return [str(number)]
    if number >= len(visible):
        raise SettingsError(f"{option}: there is no GPU {number}; {len(visible)} can be used here, from 0.")
    return [visible[number]]


def _labels(entries: Sequence[str]) -> list[str]:
    """A short name for each entry; several CPU workers are numbered."""
    several = entries.count("") > 1
    labels: list[str] = []
    for entry in entries:
        if not entry:
            number = sum(label.startswith("cpu") for label in labels)
            labels.append(f"cpu{number}" if several else "cpu")
        elif entry.isdecimal():
            labels.append(f"gpu{entry}")
        else:
            kind, _, rest = entry.partition("-")
            labels.append(f"{kind.lower()}-{rest[:8]}")
    return labels


def here(asked: str | None, device_id: int | None) -> list[Seat]:
    """A seat for each device of this host that gets a worker; see choose. Raises SettingsError."""
    return choose(asked, device_id, visible_to(os.environ, count_gpus()))
