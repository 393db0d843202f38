"""Ending processes: real ones, pinned by pidfd, beside real pynvml that reads a stub."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_admin.audit import Audit, Caller
from gpu_admin.contract import BadRequest, Conflict, HostError, NotFound, NotSupported, Refused
from gpu_admin.gpus import Gpus
from gpu_admin.processes import COMMAND_LENGTH, MAX_PID, Processes
from tests.gpu_admin.nvml import GPU_IS_LOST, VERSION_MISMATCH, Card, Held, NvmlStub
from tests.rig import ROOT, until

OPS = Caller("ops", "10.0.0.7")
CLONE_NEWPID = 0x2000_0000
#: Says so once it no longer minds SIGTERM.
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {}"

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a real process; it is gone after the test."""
    with ExitStack() as ended:

        def start(*command: str) -> "subprocess.Popen[bytes]":
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            ended.callback(_end, child)
            return child

        yield start


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.communicate()


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """Where the audit log is."""
    return tmp_path / "audit.log"


@pytest.fixture
def processes(nvml: NvmlStub, audit: Path) -> Processes:
    """What may end the processes that hold memory of the stub's GPUs; the service started none."""
    return Processes(Gpus(), frozenset, Audit(audit))


def events(audit: Path) -> list[dict[str, Any]]:
    """The audit log, without times."""
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_a_process_on_any_gpu_ends_and_the_audit_log_says_by_whom(
    nvml: NvmlStub, processes: Processes, audit: Path, start: Start
) -> None:
    child = start("sleep", "60")
    nvml.write([Card(), Card()], [Held(child.pid, 100, gpu=1, kind="graphics")])

    killed = processes.kill(child.pid, OPS)

    assert (killed.pid, killed.name, killed.command) == (child.pid, "sleep", "sleep 60")
    # It was gone when the call returned.
    assert child.poll() == -signal.SIGTERM
    [line] = events(audit)
    who = {"key": "ops", "address": "10.0.0.7"}
    what = {"pid": child.pid, "name": "sleep", "command": "sleep 60", "signal": "SIGTERM"}
    assert line == {"event": "process.killed", **who, **what}


def test_one_that_ignores_sigterm_is_killed_after_the_grace_time(nvml: NvmlStub, audit: Path, start: Start) -> None:
    child = start(sys.executable, "-c", STUBBORN.format("time.sleep(60)"))
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    nvml.write([Card()], [Held(child.pid)])

    Processes(Gpus(), frozenset, Audit(audit), grace_s=0.1).kill(child.pid, OPS)

    assert child.poll() == -signal.SIGKILL
    assert [line["signal"] for line in events(audit)] == ["SIGKILL"]


def test_one_that_takes_its_time_to_end_is_left_to_it(nvml: NvmlStub, audit: Path, start: Start) -> None:
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(7)))"
    child = start(sys.executable, "-c", program + "; print('ready', flush=True); time.sleep(60)")
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    nvml.write([Card()], [Held(child.pid)])

    Processes(Gpus(), frozenset, Audit(audit), grace_s=10).kill(child.pid, OPS)

    assert child.poll() == 7


def test_a_stopped_process_is_killed_too(nvml: NvmlStub, audit: Path, start: Start) -> None:
    child = start("sleep", "60")
    child.send_signal(signal.SIGSTOP)
    nvml.write([Card()], [Held(child.pid)])

    Processes(Gpus(), frozenset, Audit(audit), grace_s=0.1).kill(child.pid, OPS)

    assert child.poll() == -signal.SIGKILL


@pytest.mark.parametrize("pid", [0, -1, MAX_PID + 1, True, "12", 1.0])
def test_what_is_no_pid_is_a_bad_request(processes: Processes, audit: Path, pid: Any) -> None:
    with pytest.raises(BadRequest, match=f"pid: must be an integer from 1 to {MAX_PID}"):
        processes.kill(pid, OPS)

    assert [(line["event"], line["status"]) for line in events(audit)] == [("process.refused", 400)]


def test_the_first_process_is_refused(nvml: NvmlStub, processes: Processes, audit: Path) -> None:
    nvml.write([Card()], [Held(1)])

    with pytest.raises(Refused, match="Process 1 "):
        processes.kill(1, OPS)

    assert [(line["event"], line["status"], line["pid"]) for line in events(audit)] == [("process.refused", 403, 1)]


@pytest.mark.parametrize("pid", [os.getpid, os.getppid], ids=["own", "parent"])
def test_the_service_and_its_parents_are_refused_even_on_a_gpu(
    nvml: NvmlStub, audit: Path, pid: Callable[[], int]
) -> None:
    nvml.write([Card()], [Held(pid())])

    with pytest.raises(Refused, match="belongs to this service"):
        Processes(Gpus(), lambda: frozenset([pid()]), Audit(audit)).kill(pid(), OPS)

    assert [line["status"] for line in events(audit)] == [403]


def test_the_other_server_processes_are_refused(nvml: NvmlStub, audit: Path, start: Start) -> None:
    # A server that forks two processes, as gunicorn does; the second one is told to end the first.
    program = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from gpu_admin.audit import Audit, Caller
        from gpu_admin.processes import Processes
        first = os.fork()
        if first == 0:
            signal.pause()
        if os.fork() == 0:
            try:
                Processes(None, lambda: frozenset([first]), Audit(Path({str(audit)!r}))).kill(first, Caller("ops", ""))
            except Exception as error:
                print(repr(error), flush=True)
            os._exit(0)
        try:
            os.wait()
        finally:
            os.kill(first, signal.SIGKILL)
    """
    server = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)

    assert re.match(r"Refused\('Process \d+ \(python.*\) belongs to this service", server.stdout)
    assert [line["status"] for line in events(audit)] == [403]


def test_one_that_is_gone_is_not_found(processes: Processes, audit: Path, start: Start) -> None:
    child = start("true")
    child.wait()

    with pytest.raises(NotFound, match=f"no process {child.pid}"):
        processes.kill(child.pid, OPS)

    assert [(line["status"], line["pid"]) for line in events(audit)] == [(404, child.pid)]


def test_one_that_only_waits_for_its_parent_is_gone(nvml: NvmlStub, processes: Processes, start: Start) -> None:
    child = start("true")
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    nvml.write([Card()], [Held(child.pid)])

    with pytest.raises(NotFound):
        processes.kill(child.pid, OPS)


def test_a_thread_is_no_process(processes: Processes, start: Start) -> None:
    program = "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()"
    child = start(sys.executable, "-c", program + "; print('ready', flush=True); time.sleep(60)")
    assert child.stdout is not None
    child.stdout.readline()
    [thread] = [thread.id for thread in psutil.Process(child.pid).threads() if thread.id != child.pid]

    with pytest.raises(NotFound, match="thread"):
        processes.kill(thread, OPS)

    assert child.poll() is None


def test_one_without_gpu_memory_is_refused(nvml: NvmlStub, processes: Processes, audit: Path, start: Start) -> None:
    child = start("sleep", "60")
    nvml.write([Card(), Card()], fail={("nvmlDeviceGetHandleByIndex_v2", 1): GPU_IS_LOST})

    with pytest.raises(Refused, match=r"holds no GPU memory and was not started here.*GPU 1 .*GPU is lost"):
        processes.kill(child.pid, OPS)

    assert child.poll() is None
    [line] = events(audit)
    assert (line["event"], line["status"], line["key"]) == ("process.refused", 403, "ops")
    assert (line["name"], line["command"]) == ("sleep", "sleep 60")
    assert "holds no GPU memory" in line["reason"]


def test_one_of_ours_ends_without_gpu_memory_and_without_a_driver(nvml: NvmlStub, audit: Path, start: Start) -> None:
    nvml.remove_driver()
    ours, other = start("sleep", "60"), start("sleep", "60")
    processes = Processes(Gpus(), lambda: frozenset([ours.pid]), Audit(audit))

    with pytest.raises(NotSupported, match="driver is not loaded"):
        processes.kill(other.pid, OPS)
    processes.kill(ours.pid, OPS)

    assert (ours.poll(), other.poll()) == (-signal.SIGTERM, None)
    assert [line["event"] for line in events(audit)] == ["process.refused", "process.killed"]


def test_nothing_is_ended_on_a_driver_that_does_not_work(
    nvml: NvmlStub, processes: Processes, audit: Path, start: Start
) -> None:
    child = start("sleep", "60")
    nvml.write([Card()], [Held(child.pid)], {"nvmlDeviceGetCount_v2": VERSION_MISMATCH})

    with pytest.raises(HostError, match="mismatch"):
        processes.kill(child.pid, OPS)

    assert child.poll() is None
    assert [(line["event"], line["status"]) for line in events(audit)] == [("process.refused", 500)]


def test_a_reused_pid_is_left_alone(nvml: NvmlStub, processes: Processes, audit: Path, start: Start) -> None:
    child = start("sleep", "60")
    nvml.write([Card()], [Held(child.pid)])
    [[seen]] = [gpu.processes for gpu in Gpus().read()]
    assert seen.started_at is not None

    with pytest.raises(Conflict, match="the pid has been reused"):
        processes.kill(child.pid, OPS, started_at=seen.started_at - 60)
    assert child.poll() is None
    processes.kill(child.pid, OPS, started_at=round(seen.started_at))

    assert child.poll() == -signal.SIGTERM
    assert [line["event"] for line in events(audit)] == ["process.refused", "process.killed"]


def test_a_long_command_line_is_cut_and_tells_no_secret(
    nvml: NvmlStub, processes: Processes, audit: Path, start: Start
) -> None:
    options = ["--api-key", "sk-1", "--hf-token=hf-2", "HF_TOKEN=hf-3", "--tokenizer", "Qwen", "x" * 1000]
    child = start(sys.executable, "-c", "import time; time.sleep(60)", *options)
    nvml.write([Card()], [Held(child.pid)])

    command = processes.kill(child.pid, OPS).command

    assert "--api-key *** --hf-token=*** HF_TOKEN=*** --tokenizer Qwen xxx" in command
    assert len(command) == COMMAND_LENGTH
    assert [line["command"] for line in events(audit)] == [command]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_another_users_process_is_refused(nvml: NvmlStub, start: Start) -> None:
    child = start("sleep", "60")
    nvml.write([Card()], [Held(child.pid)])
    program = """if True:
        import os, sys
        from pathlib import Path
        from gpu_admin.audit import Audit, Caller
        from gpu_admin.gpus import Gpus
        from gpu_admin.processes import Processes
        folder = Path(sys.argv[1])
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            Processes(Gpus(), frozenset, Audit(folder / "audit.log")).kill(int(sys.argv[2]), Caller("ops", ""))
        except Exception as error:
            print(int(error.status), error)
    """
    # Not under pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="gpu-nobody-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        state = folder / "nvml-state"
        state.write_text(nvml.state.read_text())
        answer = subprocess.run(
            [sys.executable, "-c", program, name, str(child.pid)],
            cwd=ROOT,
            env={**os.environ, **nvml.environ, "NVML_STUB_STATE": str(state)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        [line] = events(folder / "audit.log")

    assert answer.stdout.startswith("403 "), answer.stderr
    assert "belongs to another user" in answer.stdout
    assert child.poll() is None
    assert (line["event"], line["status"], line["name"]) == ("process.refused", 403, "sleep")


@pytest.fixture
def immortal(start: Start) -> Iterator[int]:
    """The pid of a process that SIGKILL does not end while the test runs.

    It is the first of a pid namespace, which the system keeps until all others there are gone for good; one of them is
    a child from outside, for which nobody waits before the test's end.
    """
    outside = start("unshare", "--fork", "--pid", "sleep", "60")
    try:
        until(lambda: outside.poll() is not None or psutil.Process(outside.pid).children())
        [first] = psutil.Process(outside.pid).children()
    except (psutil.Error, ValueError):
        pytest.skip("pid namespaces cannot be made here")
    program = f"""if True:
        import ctypes, os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        assert ctypes.CDLL(None).setns(os.pidfd_open({first.pid}), {CLONE_NEWPID}) == 0
        if os.fork() == 0:
            signal.pause()
        print("ready", flush=True)
        signal.sigwait([signal.SIGTERM])
        os.wait()
    """
    inside = start(sys.executable, "-c", program)
    try:
        assert inside.stdout is not None
        if inside.stdout.readline() != b"ready\n":
            pytest.skip("pid namespaces cannot be entered here")
        until(lambda: first.name() == "sleep")
        yield first.pid
    finally:
        first.kill()
        inside.terminate()
        inside.wait(10)
        outside.wait(10)


def test_one_that_survives_sigkill_is_told_with_its_status(nvml: NvmlStub, audit: Path, immortal: int) -> None:
    nvml.write([Card()], [Held(immortal)])

    with pytest.raises(HostError, match=r"has not ended within 0\.2 s after SIGKILL; its status is \w+") as caught:
        Processes(Gpus(), frozenset, Audit(audit), grace_s=0.1, killed_s=0.2).kill(immortal, OPS)

    assert caught.value.status == 500
    assert [(line["event"], line["pid"]) for line in events(audit)] == [("process.survived", immortal)]
