"""The GPUs as real pynvml reads them from a stub of NVIDIA's library."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from gpu_admin.contract import HostError, NotSupported
from gpu_admin.gpus import Gpu, Gpus
from tests.gpu_admin.nvml import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    VERSION_MISMATCH,
    Card,
    Held,
    NvmlStub,
)
from tests.rig import ROOT, until


def test_a_gpu_is_told_whole(nvml: NvmlStub) -> None:
    nvml.write([Card(used_mib=11_183)], [Held(os.getpid(), 4096)])

    [gpu] = Gpus().read()

    assert (gpu.id, gpu.name) == (0, "NVIDIA GeForce RTX 4090")
    assert gpu.uuid == "GPU-00000000-0000-0000-0000-000000000000"
    assert (gpu.memory_total_mib, gpu.memory_used_mib) == (24_576, 11_183)
    assert gpu.memory_percent == pytest.approx(45.5, abs=0.01)
    assert (gpu.power_w, gpu.utilization_percent, gpu.temperature_c) == (150.7, 37, 61)
    assert gpu.error is None
    [process] = gpu.processes
    me = psutil.Process()
    assert (process.pid, process.name, process.memory_mib) == (me.pid, me.name(), 4096)
    assert process.started_at == me.create_time()


def test_every_gpu_has_its_own_processes(nvml: NvmlStub) -> None:
    nvml.write([Card(), Card("NVIDIA A100"), Card()], [Held(os.getpid(), 100), Held(os.getpid(), 200, gpu=1)])

    gpus = Gpus().read()

    assert [gpu.id for gpu in gpus] == [0, 1, 2]
    assert [gpu.name for gpu in gpus][1] == "NVIDIA A100"
    assert [[process.memory_mib for process in gpu.processes] for gpu in gpus] == [[100], [200], []]


def test_no_gpu_is_no_error(nvml: NvmlStub) -> None:
    nvml.write([])

    assert Gpus().read() == []
    assert Gpus().count() == 0


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND])
@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetPowerUsage", ["power_w"]),
        ("nvmlDeviceGetMemoryInfo", ["memory_total_mib", "memory_used_mib", "memory_percent"]),
        ("nvmlDeviceGetUtilizationRates", ["utilization_percent"]),
        ("nvmlDeviceGetTemperature", ["temperature_c"]),
        ("nvmlDeviceGetName", ["name"]),
        ("nvmlDeviceGetUUID", ["uuid"]),
    ],
)
def test_what_a_card_does_not_report_is_none(nvml: NvmlStub, function: str, fields: list[str], code: int) -> None:
    nvml.write([Card(), Card()], fail={(function, 1): code})

    whole, partly = Gpus().read()

    assert [name for name in _FIELDS if getattr(whole, name) is None] == []
    assert [name for name in _FIELDS if getattr(partly, name) is None] == [name for name in _FIELDS if name in fields]
    assert partly.error is None


_FIELDS = [
    *("name", "uuid", "memory_total_mib", "memory_used_mib", "memory_percent"),
    *("power_w", "utilization_percent", "temperature_c"),
]


def test_a_field_that_fails_is_named_and_the_others_stay(nvml: NvmlStub) -> None:
    nvml.write([Card()], fail={"nvmlDeviceGetPowerUsage": UNKNOWN})

    [gpu] = Gpus().read()

    assert (gpu.power_w, gpu.temperature_c, gpu.error) == (None, 61, "power: Unknown Error")


@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetTemperature", "nvmlDeviceGetComputeRunningProcesses_v3"],
)
def test_a_gpu_that_fell_off_the_bus_does_not_hide_the_others(nvml: NvmlStub, function: str) -> None:
    nvml.write([Card(), Card(), Card()], [Held(os.getpid(), gpu=2)], fail={(function, 1): GPU_IS_LOST})

    first, lost, last = Gpus().read()

    assert lost == Gpu(1, error="GPU is lost")
    assert (first.temperature_c, last.temperature_c) == (61, 61)
    assert [process.pid for process in last.processes] == [os.getpid()]


def test_a_process_that_computes_and_draws_is_one(nvml: NvmlStub) -> None:
    me, parent = os.getpid(), os.getppid()
    nvml.write([Card()], [Held(me, 300), Held(me, 300, kind="graphics"), Held(parent, None, kind="graphics")])
    gpus = Gpus()

    [gpu] = gpus.read()

    assert [(process.pid, process.memory_mib) for process in gpu.processes] == [(me, 300), (parent, None)]
    assert gpus.memory_mib(0, frozenset([me])) == 300


def test_an_older_driver_tells_its_processes_too(nvml: NvmlStub) -> None:
    versions = [f"nvmlDeviceGet{kind}RunningProcesses_v3" for kind in ("Compute", "Graphics")]
    nvml.write([Card()], [Held(os.getpid())], fail=dict.fromkeys(versions, FUNCTION_NOT_FOUND))

    [gpu] = Gpus().read()

    assert [process.pid for process in gpu.processes] == [os.getpid()]


def test_a_card_without_graphics_tells_who_computes(nvml: NvmlStub) -> None:
    nvml.write([Card()], [Held(os.getpid())], {"nvmlDeviceGetGraphicsRunningProcesses_v3": NOT_SUPPORTED})

    [gpu] = Gpus().read()

    assert [process.pid for process in gpu.processes] == [os.getpid()]
    assert gpu.error is None


def test_a_process_without_a_name_is_told(nvml: NvmlStub) -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    nvml.write([Card()], [Held(os.getpid()), Held(child.pid)], {"nvmlSystemGetProcessName": NO_PERMISSION})

    [gpu] = Gpus().read()

    assert [process.name for process in gpu.processes] == [psutil.Process().name(), "N/A"]
    assert gpu.processes[1].started_at is None


def test_a_process_is_named_by_its_program(nvml: NvmlStub) -> None:
    comm = Path(f"/proc/{os.getpid()}/comm")
    before = comm.read_text()
    nvml.write([Card()], [Held(os.getpid())])

    try:
        # Some drivers tell the path, and what follows it.
        comm.write_text("/opt/bin/tis -x")
        [gpu] = Gpus().read()
    finally:
        comm.write_text(before.strip())

    assert [process.name for process in gpu.processes] == ["tis"]


def test_memory_is_summed_over_the_pids_that_are_on_that_gpu(nvml: NvmlStub) -> None:
    held = [Held(11, 100), Held(12, 200), Held(13, 400), Held(11, 800, gpu=1), Held(14, None)]
    nvml.write([Card(), Card()], held, {("nvmlDeviceGetHandleByIndex_v2", 1): GPU_IS_LOST})
    gpus = Gpus()

    assert gpus.memory_mib(0, frozenset([11, 12, 999])) == 300
    assert gpus.memory_mib(0, frozenset([999])) == 0
    assert gpus.memory_mib(0, frozenset([11, 14])) is None
    assert gpus.memory_mib(1, frozenset([11])) is None
    assert gpus.memory_mib(7, frozenset([11])) is None


def test_without_a_driver_the_host_says_what_to_install_and_a_late_one_is_found(nvml: NvmlStub) -> None:
    nvml.remove_driver()
    gpus = Gpus()

    with pytest.raises(NotSupported, match="driver is not loaded: install it"):
        gpus.read()
    assert gpus.count() is None
    assert gpus.memory_mib(0, frozenset([1])) is None

    nvml.write([Card(), Card()])
    assert len(gpus.read()) == 2

    nvml.remove_driver()
    assert gpus.count() is None

    nvml.write([Card()])
    assert gpus.count() == 1


@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2"])
def test_a_driver_that_does_not_work_is_a_500_in_its_own_words(nvml: NvmlStub, function: str) -> None:
    nvml.write([Card()], fail={function: VERSION_MISMATCH})
    gpus = Gpus()

    with pytest.raises(HostError, match="mismatch") as caught:
        gpus.read()
    assert caught.value.status == 500
    with pytest.raises(HostError, match="mismatch"):
        gpus.count()
    assert gpus.memory_mib(0, frozenset([1])) is None

    nvml.write([Card()], fail={function: DRIVER_NOT_LOADED})
    with pytest.raises(NotSupported):
        gpus.read()


def test_a_driver_that_hangs_is_told_at_once_and_found_when_it_is_back(nvml: NvmlStub) -> None:
    nvml.write([Card()], hang=["nvmlDeviceGetPowerUsage"])
    gpus = Gpus(answer_s=0.2)

    try:
        with pytest.raises(HostError, match=r"has not answered within 0\.2 s") as caught:
            gpus.read()
        assert caught.value.status == 500
        assert gpus.memory_mib(0, frozenset([1])) is None
        # However many ask: no more than one call is in the driver.
        assert [thread.name for thread in threading.enumerate()].count("nvml") == 1
    finally:
        nvml.write([Card()])

    def works() -> bool:
        try:
            return len(gpus.read()) == 1
        except HostError:
            return False

    until(works)


def test_a_process_forked_while_the_driver_hangs_can_ask(nvml: NvmlStub, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = NvmlStub(folder)
    nvml.write([Card()], hang=["nvmlDeviceGetPowerUsage"])
    program = f"""if True:
        import os
        from gpu_admin.contract import HostError
        from gpu_admin.gpus import Gpus
        gpus = Gpus(answer_s=0.2)
        try:
            gpus.read()
        except HostError:
            if os.fork() == 0:
                os.environ["NVML_STUB_STATE"] = {str(other.state)!r}
                print(len(gpus.read()), flush=True)
                os._exit(0)
            os.wait()
    """

    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **nvml.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert answer.stdout == "1\n", answer.stderr


def test_many_threads_read_at_once_while_the_driver_comes_and_goes(nvml: NvmlStub) -> None:
    gpus = Gpus()

    def read(number: int) -> int | None:
        if number % 10 == 0:
            nvml.remove_driver()
        elif number % 10 == 5:
            nvml.write([Card(), Card()])
        try:
            return len([gpu for gpu in gpus.read() if gpu.error is None])
        except NotSupported:
            return None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(96)))

    nvml.write([Card(), Card()])
    assert len(gpus.read()) == 2


@pytest.mark.parametrize(
    ("before", "words"),
    [("", "install the NVIDIA driver"), ("sys.modules['pynvml'] = None", "pip install nvidia-ml-py")],
    ids=["no library", "no pynvml"],
)
def test_without_the_library_the_host_says_what_to_install(tmp_path: Path, before: str, words: str) -> None:
    # In a process of its own: this one may have loaded the stub.
    program = f"""if True:
        import sys
        {before}
        from gpu_admin.gpus import Gpus
        if Gpus().count() is not None:
            sys.exit()
        try:
            Gpus().read()
        except Exception as error:
            print(int(error.status), error)
    """
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert answer.returncode == 0, answer.stderr
    if answer.stdout == "":
        pytest.skip("this host has GPUs")
    assert answer.stdout.startswith("501 ")
    assert words in answer.stdout
