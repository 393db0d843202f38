"""The GPUs of this host and who holds their memory, as NVIDIA's management library (NVML) tells it."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from gpu_admin.contract import HostError, NotSupported

try:
    import pynvml
except ImportError:
    pynvml = None

T = TypeVar("T")

#: The first answer of eight GPUs without the driver's persistence mode takes this long.
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    #: Its program, without the folder; "N/A" where nobody can tell.
    name: str
    #: None where the driver does not say.
    memory_mib: int | None
    #: Unix seconds; None for a process that this host does not show, such as one of another container.
    started_at: float | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU at one moment; what its card or driver does not report is None."""

    id: int
    name: str | None = None
    uuid: str | None = None
    memory_total_mib: int | None = None
    #: With what the driver holds for itself: the rest is free.
    memory_used_mib: int | None = None
    power_w: float | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    #: Why it could not be read, or which of its fields could not.
    error: str | None = None

    @property
    def memory_percent(self) -> float | None:
        """How much of its memory is taken, 0 to 100."""
        if self.memory_used_mib is None or not self.memory_total_mib:
            return None
        return 100 * self.memory_used_mib / self.memory_total_mib


class Gpus:
    """Asks NVML, one question at a time, whichever thread asks; nothing is remembered."""

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        """answer_s: how long NVML may take before it counts as hanging."""
        self._answer_s = answer_s
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._free = threading.Lock()
        self._hangs = False
        self._opened = False

    def read(self) -> list[Gpu]:
        """Every GPU by its number; one that does not answer has an `error` and does not hide the others.

        Raises NotSupported where there is no library or driver, HostError if NVML as a whole fails or hangs.
        """
        return self._ask(self._read)

    def count(self) -> int | None:
        """How many there are, None where there is no library or driver. Raises HostError if NVML fails or hangs."""
        try:
            return self._ask(self._count)
        except NotSupported:
            return None

    def memory_mib(self, gpu_id: int, pids: frozenset[int]) -> float | None:
        """Device memory that these processes hold on a GPU together; None where the host cannot tell. Raises nothing.

        A process that is not on the GPU holds 0.
        """
        try:
            held = self._ask(lambda: self._held(gpu_id))
        except HostError:
            return None
        sizes = [size for pid, size in held.items() if pid in pids]
        return None if None in sizes else sum(size or 0 for size in sizes) / 2**20

    def _ask(self, question: Callable[[], T]) -> T:
        # In a process forked meanwhile the thread that would let go of the lock does not exist.
        if self._pid != os.getpid():
            self._begin()
        # A driver in trouble keeps NVML's calls for ever, in a sleep that no signal ends (NVIDIA/go-nvml#152,
        # NVIDIA/open-gpu-kernel-modules#1333). Such a call keeps its thread and no request's; until it returns, the
        # next ones are refused at once.
        if not self._free.acquire(timeout=0 if self._hangs else self._answer_s):
            self._hangs = True
            raise HostError(self._hanging)
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001  it is raised in the thread that asked
                answer.set_exception(error)
            finally:
                self._hangs = False
                self._free.release()

        threading.Thread(target=ask, name="nvml", daemon=True).start()
        try:
            return answer.result(self._answer_s)
        except TimeoutError:
            self._hangs = True
            raise HostError(self._hanging) from None

    @property
    def _hanging(self) -> str:
        return (
            f"The NVIDIA driver has not answered within {self._answer_s:g} s. Does nvidia-smi? "
            "The kernel's log (dmesg, lines with NVRM or Xid) says more; often only a reboot helps."
        )

    def _read(self) -> list[Gpu]:
        # A process on several GPUs is looked up once.
        known: dict[int, tuple[str, float | None]] = {}
        return [_gpu(number, known) for number in range(self._count())]

    def _held(self, gpu_id: int) -> dict[int, int | None]:
        self._count()
        try:
            return _processes(pynvml.nvmlDeviceGetHandleByIndex(gpu_id))
        except pynvml.NVMLError as error:
            raise HostError(str(error)) from error

    def _count(self) -> int:
        """How many GPUs there are, with NVML opened for the calls that follow."""
        if pynvml is None:
            raise NotSupported("nvidia-ml-py is not installed: pip install nvidia-ml-py.")
        try:
            if self._opened:
                try:
                    return int(pynvml.nvmlDeviceGetCount())
                except pynvml.NVMLError:
                    # The driver may have been exchanged beneath an open library: opened again, NVML finds the new one.
                    with contextlib.suppress(pynvml.NVMLError):
                        pynvml.nvmlShutdown()
                    self._opened = False
            # Kept open. While nobody holds a GPU the driver lets go of it, and takes seconds to come back.
            pynvml.nvmlInit()
            self._opened = True
            return int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError_LibraryNotFound as error:
            raise NotSupported(
                "This host has no NVML library (libnvidia-ml.so.1): install the NVIDIA driver, "
                "or run this service's container with the NVIDIA runtime."
            ) from error
        except pynvml.NVMLError_DriverNotLoaded as error:
            raise NotSupported("The NVIDIA driver is not loaded: install it, or load it by nvidia-smi.") from error
        except pynvml.NVMLError as error:
            raise HostError(f"The NVIDIA driver does not work: {error}. Does nvidia-smi?") from error


def _gpu(number: int, known: dict[int, tuple[str, float | None]]) -> Gpu:
    troubles: list[str] = []

    def ask(field: str, read: Callable[[Any], T]) -> T | None:
        try:
            return read(handle)
        except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
            raise
        except pynvml.NVMLError as error:
            if not _unreported(error):
                troubles.append(f"{field}: {error}")
            return None

    try:
        # Here the driver reaches for the card: what is wrong with one shows here first.
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        # The first version of it: what the driver keeps for itself counts as used.
        memory = ask("memory", pynvml.nvmlDeviceGetMemoryInfo)
        power_mw = ask("power", pynvml.nvmlDeviceGetPowerUsage)
        utilization = ask("utilization", pynvml.nvmlDeviceGetUtilizationRates)
        return Gpu(
            id=number,
            name=ask("name", pynvml.nvmlDeviceGetName),
            uuid=ask("uuid", pynvml.nvmlDeviceGetUUID),
            memory_total_mib=None if memory is None else memory.total >> 20,
            memory_used_mib=None if memory is None else memory.used >> 20,
            power_w=None if power_mw is None else power_mw / 1000,
            utilization_percent=None if utilization is None else float(utilization.gpu),
            temperature_c=ask("temperature", _temperature),
            processes=tuple(_described(ask("processes", _processes) or {}, known)),
            error="; ".join(troubles) or None,
        )
    except pynvml.NVMLError as error:
        return Gpu(number, error=str(error))


def _unreported(error: Exception) -> bool:
    """Whether it only means that this card, driver or user does not get this."""
    return isinstance(
        error, pynvml.NVMLError_NotSupported | pynvml.NVMLError_NoPermission | pynvml.NVMLError_FunctionNotFound
    )


def _temperature(handle: Any) -> float:
    return float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _processes(handle: Any) -> dict[int, int | None]:
    """Bytes that each process holds, by pid; None where the driver does not say."""
    held: dict[int, int | None] = {}
    for kind in ("Compute", "Graphics"):
        for info in _running(handle, kind):
            # One that does both is in both lists, each time with all that it holds.
            sizes = [size for size in (held.get(info.pid), info.usedGpuMemory) if size is not None]
            held[info.pid] = max(sizes, default=None)
    return held


def _running(handle: Any, kind: str) -> list[Any]:
    # Drivers before 510 know version 2 alone.
    for version in ("v3", "v2"):
        try:
            found: list[Any] = getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}")(handle)
        except pynvml.NVMLError_FunctionNotFound:
            continue
        except pynvml.NVMLError as error:
            # A card without graphics still tells who computes.
            if kind == "Graphics" and _unreported(error):
                return []
            raise
        return found
    return []


def _described(held: dict[int, int | None], known: dict[int, tuple[str, float | None]]) -> list[GpuProcess]:
    found = []
    for pid, size in held.items():
        if pid not in known:
            known[pid] = _who(pid)
        name, started_at = known[pid]
        found.append(GpuProcess(pid, name, None if size is None else size >> 20, started_at))
    return found


def _who(pid: int) -> tuple[str, float | None]:
    """The program of a process, and when it started."""
    try:
        name = str(pynvml.nvmlSystemGetProcessName(pid))
    except (pynvml.NVMLError, UnicodeDecodeError):
        name = ""
    if name.startswith("/"):
        # Drivers differ: the program alone, its path, or the path with arguments.
        name = name.split(" ")[0].rsplit("/", 1)[-1]
    started_at = None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        started_at = process.create_time()
        name = name or process.name()
    return name or "N/A", started_at
