"""One process per device: which devices, what each worker is told, and that they are kept alive and end together."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tasks.devices import choose, visible_to
from tasks.job import JobState
from tasks.launch import plan
from tasks.options import DirectSettings, SettingsError, WorkerSettings
from tests.rig import Platform, until

ROOT = Path(__file__).resolve().parents[2]
#: What pynvml asks of the driver for a count of GPUs.
NVML = """
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
"""


@pytest.mark.parametrize(
    ("asked", "device_id", "visible", "chosen"),
    [
        (None, None, [], {"cpu": ""}),
        (None, None, ["0", "1"], {"gpu0": "0", "gpu1": "1"}),
        (None, 1, ["0", "1"], {"gpu1": "1"}),
        # The seed's configuration names device 0, and has to run anywhere.
        (None, 0, [], {"cpu": ""}),
        ("all", 1, ["0", "1"], {"gpu0": "0", "gpu1": "1"}),
        ("0,2", None, ["0", "1", "2"], {"gpu0": "0", "gpu2": "2"}),
        # Numbers count among the visible ones.
        ("1", None, ["4", "6"], {"gpu6": "6"}),
        (
            "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            None,
            [],
            {"gpu-8932f937": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"},
        ),
        # A GPU that NVML does not see.
        ("0", None, [], {"gpu0": "0"}),
        (" cpu ,0", None, ["0"], {"cpu": "", "gpu0": "0"}),
        ("cpu,cpu", None, ["0"], {"cpu0": "", "cpu1": ""}),
    ],
)
def test_devices_are_chosen_as_told(asked, device_id, visible, chosen):
    seats = choose(asked, device_id, visible)

    assert {seat.label: seat.visible for seat in seats} == chosen


@pytest.mark.parametrize(
    ("asked", "device_id", "visible", "said"),
    [
        ("2", None, ["0", "1"], "--devices: there is no GPU 2"),
        (None, 2, ["0", "1"], "GPU_DEVICE_ID: there is no GPU 2"),
        ("all", None, [], "shows no GPU"),
        ("0,0", None, ["0"], "named twice"),
        ("cuda:0", None, ["0"], "'cuda:0' is no device"),
        (",", None, ["0"], "name at least one"),
    ],
)
def test_devices_that_cannot_be_had_are_named(asked, device_id, visible, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        choose(asked, device_id, visible)


@pytest.mark.parametrize(
    ("limit", "visible"),
    [(None, ["0", "1", "2"]), ("2,0", ["2", "0"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("1,7", ["1"])],
)
def test_a_launcher_keeps_to_what_it_may_see(limit, visible):
    environ = {} if limit is None else {"CUDA_VISIBLE_DEVICES": limit}

    assert visible_to(environ, 3) == visible


def told(worker: WorkerSettings, asked: str = "0,1", region: str | None = "asia-east"):
    return plan(choose(asked, None, ["0", "1"]), worker, region=region, queues=None, host="node7")


def test_workers_are_named_after_region_host_and_device():
    plans = told(WorkerSettings())

    assert [one.command[-1] for one in plans] == ["asia-east-gpu0@%h", "asia-east-gpu1@%h"]
    assert [one.environ["GPU_NAME"] for one in plans] == ["asia-east-node7-gpu0", "asia-east-node7-gpu1"]
    assert [one.environ["GPU_NAME"] for one in told(WorkerSettings(), region=None)] == ["node7-gpu0", "node7-gpu1"]


def test_a_name_that_was_given_stays_unless_several_would_share_it():
    given = WorkerSettings(name="My-GPU-Worker")

    assert [one.environ["GPU_NAME"] for one in told(given, "1")] == ["My-GPU-Worker"]
    assert [one.environ["GPU_NAME"] for one in told(given)] == ["My-GPU-Worker-gpu0", "My-GPU-Worker-gpu1"]


def test_each_worker_in_direct_mode_has_the_next_port():
    direct = DirectSettings(enabled=True, port=9000, public_url="https://gpu.example.com:443/node7")

    plans = told(WorkerSettings(direct=direct))

    assert [one.environ["GPU_DIRECT_PORT"] for one in plans] == ["9000", "9001"]
    urls = ["https://gpu.example.com:443/node7", "https://gpu.example.com:444/node7"]
    assert [one.environ["GPU_DIRECT_PUBLIC_URL"] for one in plans] == urls


def test_several_workers_cannot_share_one_public_url():
    direct = DirectSettings(enabled=True, public_url="https://gpu.example.com")

    with pytest.raises(SettingsError, match="needs a port"):
        told(WorkerSettings(direct=direct))


class Launched:
    """A real `python -m tasks.launch`."""

    def __init__(self, environ: dict[str, str], log: Path, *options: str) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.launch", *options],
                cwd=ROOT,
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def find(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.said)

    def hears(self, pattern: str, times: int = 1, seconds: float = 40) -> None:
        """Wait until it has said something so often."""
        until(lambda: len(self.find(pattern)) >= times or self.process.poll() is not None, seconds)
        assert len(self.find(pattern)) >= times, self.said

    def worker(self, name: str) -> psutil.Process:
        """The worker of that name as it runs now."""
        return psutil.Process(int(self.find(rf"{name}: starting, pid (\d+)")[-1]))

    def ends(self, seconds: float) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def launch(
    make_platform: Callable[..., Platform], tmp_path: Path
) -> Iterator[Callable[..., tuple[Platform, Launched]]]:
    """Start a platform and a launcher on it; environment as keyword arguments."""
    running: list[Launched] = []

    def start(*options: str, **environ: str) -> tuple[Platform, Launched]:
        platform = make_platform(**environ)
        running.append(Launched(platform.environ, tmp_path / "launcher.log", *options))
        return platform, running[-1]

    yield start
    for one in running:
        # Its workers go with it.
        one.process.kill()
        one.process.wait()


def test_a_worker_that_dies_comes_back_under_its_name_and_all_drain(launch):
    platform, launcher = launch(
        "--devices",
        "cpu,cpu",
        GPU_REGION="asia-east",
        GPU_SUPPORTED_TYPES="llm",
        GPU_MAX_CONCURRENT_JOBS="1",
    )
    launcher.hears(r"worker asia-east-\S+ serves llm", 2)

    launcher.worker("asia-east-cpu0").kill()
    launcher.hears(r"asia-east-cpu0 +\| .*serves llm", 2)
    jobs = [platform.submit("sleep 2") for _ in range(2)]
    platform.until(lambda: all(platform.status(job) is JobState.RUNNING for job in jobs))
    launcher.process.terminate()

    assert launcher.ends(20) == 0, launcher.said
    done = [platform.ended(job) for job in jobs]
    assert [job.status for job in done] == [JobState.COMPLETED] * 2
    assert [job.attempt for job in done] == [1, 1]
    names = {worker_id.rpartition("-")[0] for worker_id in launcher.find(r"worker (\S+) serves")}
    assert len(names) == 2
    assert {job.worker_id.rpartition("-")[0] for job in done} == names
    assert [re.sub(r"pid \d+", "pid", line) for line in launcher.find(r"asia-east-cpu0: (.*)")] == [
        "starting, pid, restarts 0",
        "waiting, terminated by SIGKILL, restarts 0, again in 1 s",
        "starting, pid, restarts 1",
        "draining, pid, restarts 1",
        "stopped, exit status 0, restarts 1",
    ]


def test_a_worker_that_is_configured_wrongly_is_not_started_again(launch):
    _, launcher = launch("--devices", "cpu,cpu", "-Q", "mars.llm")

    assert launcher.ends(40) == 78
    assert len(launcher.find(r"mars-cpu\d +\| .*The worker cannot start: .*'mars' is not configured")) == 2
    assert len(launcher.find("starting")) == 2
    assert len(launcher.find(r"refused, exit status 78, restarts 0")) == 2
    assert "no worker is left" in launcher.said


def test_a_second_signal_ends_a_worker_that_does_not_drain(launch):
    _, launcher = launch("-Q", "asia-east.llm", "--devices", "cpu")
    launcher.hears("starting, pid")
    worker = launcher.worker("asia-east-cpu")
    # Until then it is a copy of the launcher, which waits for it.
    until(lambda: any("celery" in word for word in worker.cmdline()))
    worker.send_signal(signal.SIGSTOP)

    launcher.process.send_signal(signal.SIGINT)
    launcher.hears("draining")
    launcher.process.send_signal(signal.SIGINT)

    assert launcher.ends(30) == 1
    assert "stopped, terminated by SIGKILL" in launcher.said


def test_every_gpu_of_the_host_gets_a_worker_that_sees_no_other(launch, tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler for a driver's library")
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", tmp_path / "nvml.c"], check=True)

    _, launcher = launch("-Q", "asia-east.llm", LD_LIBRARY_PATH=str(tmp_path))
    launcher.hears("starting, pid", 2)
    workers = [launcher.worker(f"asia-east-gpu{number}") for number in range(2)]
    # Until then it is a copy of the launcher.
    until(lambda: all("celery" in worker.cmdline() for worker in workers))
    seen = [worker.environ() for worker in workers]
    launcher.process.kill()

    assert [environ["CUDA_VISIBLE_DEVICES"] for environ in seen] == ["0", "1"]
    assert [environ["GPU_DEVICE_ID"] for environ in seen] == ["0", "0"]
    # A launcher that was killed leaves no worker behind on a device.
    psutil.wait_procs(workers, 10)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_a_configuration_that_no_worker_could_use_stops_the_launcher_itself(launch, tmp_path):
    wrong = tmp_path / "config.yaml"
    wrong.write_text("load_control:\n  acceptance_rate: 2\n")

    _, launcher = launch(GPU_CONFIG=str(wrong))

    assert launcher.ends(20) == 78
    assert "2: load_control.acceptance_rate must be at most 1" in launcher.said
