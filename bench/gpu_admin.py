"""A host's admin API: what it adds to a start, how fast it answers, and what start and stop leave behind.

python -m bench.gpu_admin [--starts 5] [--requests 500] [--cycles 200]

The real server, with what the tests put where this machine lacks the part: a compiled stub for NVML, a Docker engine
whose containers are real tritonservers, and a small HTTP program with ComfyUI's command line (or ComfyUI itself, in the
folder that COMFYUI_DIRECTORY names).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import requests
import yaml

from bench.rig import READY_S, Client, Rig, free_port, rig
from tests.gpu_admin import comfyui_case, triton_case
from tests.gpu_admin.cases import Case
from tests.gpu_admin.nvml import Card, Held, NvmlStub
from tests.gpu_admin.triton_server import TritonServer, write_model

GPUS, PROCESSES = 8, 40
#: So often a start is asked for its state.
LOOK_S = 0.01
#: Cycles before the first count: imports, pools and caches come with them.
WARM_UP = 3


@dataclass(frozen=True)
class Counted:
    """What the service and its host hold."""

    files: int
    threads: int
    children: int
    ports: int
    servers: int
    data_files: int
    memory_mib: float


class Service:
    """The admin API of one host, with the runners of some cases."""

    def __init__(self, made: Rig, cases: list[Case], nvml: NvmlStub) -> None:
        self.cases = cases
        self._data = made.folder / "data"
        self._port = port = free_port()
        told = made.folder / "gpu_admin.yaml"
        sections = {case.runner: section_of(case) for case in cases}
        told.write_text(yaml.safe_dump({"data_dir": str(self._data), "port": port, **sections}))
        environ = {"GPU_ADMIN_CONFIG": str(told), **nvml.environ}
        for case in cases:
            environ |= case.environ
        command = [sys.executable, "-m", "gunicorn", "gpu_admin:create_app()"]
        self._master = psutil.Process(made.start("gpu_admin", *command, ready="Booting worker", **environ).pid)
        wait_for(self._is_up)
        self._client = Client(port)

    def get(self, path: str) -> Any:
        """The answer's JSON."""
        status, answer = self._client.request("GET", path)
        if status != 200:
            sys.exit(f"GET {path}: {status} {answer!r}")
        return json.loads(answer)

    def start(self, model: str, gpu_id: int) -> float:
        """Seconds until a model runs."""
        began = time.monotonic()
        self._change("start", model, gpu_id)
        wait_for(lambda: self._runs(model, gpu_id), LOOK_S)
        return time.monotonic() - began

    def stop(self, model: str, gpu_id: int) -> float:
        """Seconds until a model is gone."""
        began = time.monotonic()
        self._change("stop", model, gpu_id)
        return time.monotonic() - began

    def count(self) -> Counted:
        """What there is now."""
        processes = [self._master, *self._master.children(recursive=True)]
        listening = [each.laddr.port for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        return Counted(
            files=sum(process.num_fds() for process in processes),
            threads=sum(process.num_threads() for process in processes),
            children=len(processes) - 1,
            ports=sum(port in ports for port in set(listening) for ports in map(ports_of, self.cases)),
            servers=sum(case.servers() for case in self.cases),
            data_files=sum(path.is_file() for path in self._data.rglob("*")),
            memory_mib=sum(process.memory_info().rss for process in processes) / 2**20,
        )

    def _runs(self, model: str, gpu_id: int) -> bool:
        (found,) = (
            one for one in self.get("/api/v1/models/instances") if (one["model_name"], one["gpu_id"]) == (model, gpu_id)
        )
        if found["status"] == "ERROR":
            sys.exit(f"{model} does not start: {found['reason']}")
        return bool(found["status"] == "RUNNING")

    def _change(self, what: str, model: str, gpu_id: int) -> None:
        # The server closes a connection that was not used for two seconds.
        self._client = Client(self._port)
        self._client.post(f"/api/v1/models/{what}", {"model_name": model, "gpu_id": gpu_id})

    def _is_up(self) -> bool:
        try:
            return Client(self._port).request("GET", "/")[0] == 200
        except OSError:
            return False


def main() -> None:
    """Measure, and print a table of each; the exit code is 1 if the cycles left something behind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--cycles", type=int, default=200, help="of each runner")
    options = parser.parse_args()
    with rig() as made, opened(made) as (service, nvml):
        print(f"start to RUNNING, over the backend's own start ({options.starts} times each, seconds)")
        starts(service, made.folder, options.starts)
        print(f"\n{GPUS} GPUs, {PROCESSES} processes on them ({options.requests} requests each, one after the other)")
        answers(service, nvml, options.requests)
        print(f"\nleft behind by {options.cycles} starts and stops of each runner: before, after")
        left = cycles(service, options.cycles)
    sys.exit(1 if left else 0)


@contextmanager
def opened(made: Rig) -> Iterator[tuple[Service, NvmlStub]]:
    """The service on a host of eight GPUs, with a Triton and a ComfyUI runner."""
    with ExitStack() as stack:
        cases = []
        for name, make_case in (("triton", triton_case.make_case), ("comfyui", comfyui_case.make_case)):
            folder = made.folder / name
            folder.mkdir()
            cases.append(make_case(folder))
            stack.callback(cases[-1].close)
        nvml = NvmlStub(made.folder)
        nvml.write([Card()] * GPUS)
        yield Service(made, cases, nvml), nvml


def starts(service: Service, folder: Path, times: int) -> None:
    """Seconds to RUNNING, and the same backend started by hand."""
    bare: dict[str, Callable[[], float]] = {
        "triton": lambda: bare_triton(folder / "bare"),
        "comfyui": lambda: bare_comfyui(folder / "bare", service.cases[1]),
    }
    for case in service.cases:
        ours, theirs, stops = [], [], []
        # Turn by turn, so that both see the same machine.
        for _ in range(times):
            ours.append(service.start(case.model, 0))
            stops.append(service.stop(case.model, 0))
            theirs.append(bare[case.runner]())
        print(
            f"  {case.runner:10} RUNNING after {median(ours):.2f}   by itself {median(theirs):.2f}   "
            f"over it {median(ours) - median(theirs):+.2f}   stop {median(stops):.2f}"
        )


def bare_triton(folder: Path) -> float:
    """Seconds until a tritonserver that is started by hand has a model loaded."""
    write_model(folder, "fast", "fast")
    began = time.monotonic()
    server = TritonServer(folder, folder.with_suffix(".log"))
    try:
        server.load("fast")
        return time.monotonic() - began
    finally:
        server.close()


def bare_comfyui(folder: Path, case: Case) -> float:
    """Seconds until a ComfyUI that is started by hand answers."""
    directory, port = Path(case.section["directory"]), free_port()
    python = case.section["python"] or sys.executable
    options = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", *case.section["arguments"]]
    began = time.monotonic()
    with folder.with_suffix(".log").open("wb") as out:
        process = subprocess.Popen([python, "main.py", *options], cwd=directory, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers_at(f"http://127.0.0.1:{port}/system_stats"), LOOK_S)
        return time.monotonic() - began
    finally:
        process.kill()
        process.wait()


def answers(service: Service, nvml: NvmlStub, count: int) -> None:
    """How long the two resources take that are looked at all the time, with models of both kinds on every GPU."""
    for case in service.cases:
        for gpu_id in range(GPUS):
            service.start(case.model, gpu_id)
    instances = service.get("/api/v1/models/instances")
    found = {one["pid"]: one["gpu_id"] for one in instances}
    sleepers = [subprocess.Popen(["sleep", "3600"]) for _ in range(PROCESSES - len(found))]
    try:
        pids = [*found, *(process.pid for process in sleepers)]
        nvml.write([Card()] * GPUS, [Held(pid, 512, number % GPUS) for number, pid in enumerate(pids)])
        shown = sum(len(gpu["processes"]) for gpu in service.get("/api/v1/gpus"))
        print(f"  {shown} processes, {len(instances)} instances")
        for path in ("/api/v1/gpus", "/api/v1/models/status"):
            took = [timed(lambda path=path: service.get(path)) for _ in range(count)]  # type: ignore[misc]
            print(f"  GET {path:24} p50 {median(took) * 1e3:7.1f} ms   p99 {quantiles(took, n=100)[98] * 1e3:7.1f} ms")
    finally:
        for process in sleepers:
            process.kill()
            process.wait()
        nvml.write([Card()] * GPUS)
    for case in service.cases:
        for gpu_id in range(GPUS):
            service.stop(case.model, gpu_id)


def cycles(service: Service, count: int) -> bool:
    """Whether starts and stops left anything behind."""
    leaked = False
    for case in service.cases:
        for _ in range(WARM_UP):
            cycle(service, case)
        before, began = service.count(), time.monotonic()
        for _ in range(count):
            cycle(service, case)
        took = (time.monotonic() - began) / max(count, 1)
        after = service.count()
        print(f"  {case.runner}: {took:.2f} s each")
        for what in ("files", "threads", "children", "ports", "servers", "data_files", "memory_mib"):
            was, now = getattr(before, what), getattr(after, what)
            print(f"    {what:12}{was:10.0f}{now:10.0f}")
            # Pools of threads fill up as they are needed, and memory is for the reader to judge.
            leaked = leaked or (what not in ("threads", "memory_mib") and now > was)
    return leaked


def cycle(service: Service, case: Case) -> None:
    """One start, one stop."""
    service.start(case.model, 0)
    service.stop(case.model, 0)


def section_of(case: Case) -> dict[str, Any]:
    """Its settings, without the model that cannot start: a host has one of a name."""
    models = case.section["supported_models"]
    names = [name for name in models if name != case.broken]
    left = {name: models[name] for name in names} if isinstance(models, dict) else names
    return {**case.section, "supported_models": left}


def ports_of(case: Case) -> Container[int]:
    """Where its servers may listen."""
    section = case.section
    if "base_port" in section:
        return range(section["base_port"], section["base_port"] + section["ports"])
    return {section[name] for name in ("http_port", "grpc_port", "metrics_port")}


def answers_at(url: str) -> bool:
    """Whether something there answers 200."""
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def wait_for(look: Callable[[], object], pause_s: float = 0.05) -> None:
    """Ends the measurement if it does not come true."""
    end = time.monotonic() + READY_S
    while not look():
        if time.monotonic() > end:
            sys.exit("Not done in time.")
        time.sleep(pause_s)


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
