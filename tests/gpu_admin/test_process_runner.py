"""Runners whose server is a process: what all of them do, shown with vLLM's and a program in vLLM's place."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from gpu_admin import proc
from gpu_admin.contract import BadRequest, Conflict, InstanceStatus, Place, Seen, StartFailed, Wanted
from gpu_admin.runners.vllm import Runner
from gpu_admin.server_log import ServerLog
from gpu_admin.settings import SettingsError
from tests.gpu_admin import vllm_program
from tests.gpu_admin.server_case import free_ports, program
from tests.gpu_admin.stand_in import ThreadingHTTPServer
from tests.rig import free_port, until


@dataclass
class World:
    """A folder with a program in it, and everything that was started from there."""

    folder: Path
    #: MiB on a GPU, told one after the other, then none.
    memory_mib: list[float] = field(default_factory=list)
    asked: list[tuple[int, frozenset[int]]] = field(default_factory=list)

    @property
    def mark(self) -> str:
        return f"WORLD={self.folder}"

    def runner(self, *orders: str, models: dict[str, Any] | None = None, **settings: Any) -> Runner:
        """A runner with model "m", whose program obeys these orders of stand_in.py."""
        section = {
            "program": str(program(self.folder / "vllm", "tests.gpu_admin.vllm_program")),
            "environment": {"WORLD": str(self.folder), "STAND_IN": " ".join(orders)},
            "supported_models": models or {"m": {}},
            "stop_grace_seconds": 10,
            **free_ports(),
            **settings,
        }
        return Runner(section, Place(self.folder / "place", self._memory))

    def started(self, *orders: str, **settings: Any) -> tuple[Runner, Seen]:
        """A runner whose model runs on GPU 0."""
        runner = self.runner(*orders, **settings)
        runner.start(WANTED, never)
        return runner, runner.status(WANTED)

    def processes(self) -> list[proc.Process]:
        """All that lives of it."""
        return proc.marked(self.mark)

    def pid_file(self) -> Path:
        return self.folder / "place" / "m@0.json"

    def rewrite(self, **facts: Any) -> None:
        """Other facts in the pid file."""
        self.pid_file().write_text(json.dumps({**json.loads(self.pid_file().read_text()), **facts}))

    def _memory(self, gpu_id: int, pids: frozenset[int]) -> float | None:
        self.asked.append((gpu_id, pids))
        return self.memory_mib.pop(0) if self.memory_mib else None


WANTED = Wanted("m", (0,))


def never() -> bool:
    return False


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for process in world.processes():
        proc.send(process, signal.SIGKILL)
    # Its reaper still writes to the folder.
    until(lambda: not any(thread.name.startswith("reaper-") for thread in threading.enumerate()))


@pytest.fixture
def in_background() -> Iterator[Callable[[Callable[[], None]], list[BaseException]]]:
    """Run something on a thread; gives the list that its exception will be in."""
    threads = []

    def run(call: Callable[[], None]) -> list[BaseException]:
        raised: list[BaseException] = []

        def target() -> None:
            try:
                call()
            except StartFailed as error:
                raised.append(error)

        threads.append(threading.Thread(target=target))
        threads[-1].start()
        return raised

    yield run
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_a_server_runs_in_a_session_of_its_own_and_knows_none_of_our_secrets(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://app:secret@db/jobs")
    monkeypatch.setenv("HF_HOME", "/models/hub")
    runner, seen = world.started("child", environment={"WORLD": str(world.folder), "STAND_IN": "child", "MINE": "1"})

    environ = requests.get(f"http://127.0.0.1:{seen.port}/stand_in", timeout=10).json()["environ"]
    assert seen.status is InstanceStatus.RUNNING
    assert seen.pid is not None
    assert os.getsid(seen.pid) == seen.pid
    assert seen.pids == {process.pid for process in world.processes()}
    assert len(seen.pids) == 2
    assert environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert (environ["MINE"], environ["HF_HOME"]) == ("1", "/models/hub")
    assert "DATABASE_URL" not in environ
    assert Path(f"/proc/{seen.pid}/fd/0").readlink() == Path("/dev/null")
    assert any("To see the GUI" in line for line in runner.log(WANTED, 10))

    runner.stop(WANTED)
    assert runner.status(WANTED) == Seen(InstanceStatus.STOPPED)
    assert world.processes() == []
    assert not world.pid_file().exists()


def test_a_restarted_service_adopts_the_server_and_ends_it(world: World) -> None:
    _, seen = world.started()

    later = world.runner()
    later.start(WANTED, never)
    assert later.status(WANTED) == seen
    assert len(world.processes()) == 1

    later.stop(WANTED)
    assert world.processes() == []


def test_a_server_whose_starter_died_before_it_wrote_the_pid_is_found(world: World) -> None:
    runner, seen = world.started()
    world.rewrite(pid=None, started=None, ready_at=None)

    assert runner.status(WANTED).pid == seen.pid
    runner.start(WANTED, never)
    assert runner.status(WANTED) == seen

    runner.stop(WANTED)
    assert world.processes() == []


@pytest.mark.parametrize("reused", ["process", "session"])
def test_a_pid_that_is_somebody_elses_by_now_is_never_ended(world: World, reused: str) -> None:
    runner, seen = world.started()
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    until(lambda: runner.status(WANTED).status is InstanceStatus.ERROR)
    # A stranger that has the pid, or what is left of its session.
    command = "exec sleep 60" if reused == "process" else "sleep 60 & exec true"
    with subprocess.Popen(["sh", "-c", command], start_new_session=True) as stranger:
        if reused == "session":
            stranger.wait()
        left = proc.session(stranger.pid)
        assert len(left) == 1
        try:
            world.rewrite(pid=stranger.pid)

            now = runner.status(WANTED)
            runner.stop(WANTED)

            assert (now.status, now.pids) == (InstanceStatus.ERROR, frozenset())
            assert proc.session(stranger.pid) == left
        finally:
            os.kill(left[0].pid, signal.SIGKILL)


def test_after_a_reboot_nothing_of_a_server_is_there(world: World) -> None:
    runner, seen = world.started()
    world.rewrite(boot_id="another")

    assert runner.status(WANTED).status is InstanceStatus.STOPPED
    runner.stop(WANTED)

    assert seen.pid in {process.pid for process in world.processes()}


def test_instances_that_start_at_once_get_ports_of_their_own(
    world: World, in_background: Callable[[Callable[[], None]], list[BaseException]]
) -> None:
    wanted = [Wanted("m", (gpu,)) for gpu in range(3)]
    go = world.folder / "go"
    runners = [world.runner(f"after={go}") for _ in wanted]

    for runner, one in zip(runners, wanted, strict=True):
        in_background(lambda runner=runner, one=one: runner.start(one, never))  # type: ignore[misc]
    until(lambda: all(runners[0].status(one).pid for one in wanted))
    # None listened before all had chosen.
    go.touch()
    until(lambda: all(runners[0].status(one).status is InstanceStatus.RUNNING for one in wanted))

    assert len({runners[0].status(one).port for one in wanted}) == 3


def test_a_port_that_somebody_listens_on_is_stepped_over(world: World) -> None:
    with ThreadingHTTPServer(("127.0.0.1", free_ports()["base_port"]), vllm_program.Handler):
        _, seen = world.started(base_port=free_ports()["base_port"])

        assert seen.status is InstanceStatus.RUNNING
        assert seen.port != free_ports()["base_port"]


def test_a_fixed_port_that_is_taken_is_a_conflict_that_names_it(world: World) -> None:
    port = free_port()
    runner = world.runner(models={"m": {"port": port}, "n": {"port": port}})

    with (
        ThreadingHTTPServer(("127.0.0.1", port), vllm_program.Handler),
        pytest.raises(Conflict, match=rf"vllm.supported_models.m.port: port {port} is taken by another program"),
    ):
        runner.check(WANTED)
    runner.start(WANTED, never)
    runner.check(WANTED)
    with pytest.raises(Conflict, match=f"port {port} is taken by m"):
        runner.check(Wanted("n", (0,)))
    assert runner.status(WANTED).port == port


def test_who_answers_on_our_port_is_not_taken_for_our_server(
    world: World, in_background: Callable[[Callable[[], None]], list[BaseException]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_program.Handler, "models", ("m",))
    port = free_port()
    go = world.folder / "go"
    runner = world.runner(f"after={go}", models={"m": {"port": port}})
    raised = in_background(lambda: runner.start(WANTED, never))
    until(lambda: runner.status(WANTED).pid is not None)

    with ThreadingHTTPServer(("127.0.0.1", port), vllm_program.Handler) as stranger:
        thread = threading.Thread(target=stranger.serve_forever, args=(0.05,))
        thread.start()
        answer = requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).json()
        meanwhile = runner.status(WANTED).status
        go.touch()
        until(lambda: raised)
        stranger.shutdown()
        thread.join()

    assert answer["data"][0]["id"] == "m"
    assert meanwhile is InstanceStatus.STARTING
    assert "Address already in use" in str(raised[0])


def test_a_server_that_ends_while_it_starts_is_told_of_at_once_with_its_last_words(world: World) -> None:
    runner = world.runner("fail", "child")

    with pytest.raises(
        StartFailed, match=r"exited with code 3 before it served. Its last line: .*out of memory"
    ) as failed:
        runner.start(WANTED, never)

    assert "Traceback (most recent call last):" in failed.value.log
    assert runner.status(WANTED).status is InstanceStatus.STOPPED
    assert world.processes() == []


def test_a_server_that_is_never_ready_is_ended(world: World) -> None:
    runner = world.runner("slow=60", start_timeout_seconds=0.5)

    with pytest.raises(StartFailed, match=r"did not serve on port \d+ within 0.5 s, and wrote nothing"):
        runner.start(WANTED, never)

    assert world.processes() == []


def test_an_abandoned_start_leaves_the_server_to_stop(world: World) -> None:
    runner = world.runner("slow=60")

    runner.start(WANTED, lambda: True)
    assert runner.status(WANTED).status is InstanceStatus.STARTING
    runner.stop(WANTED)

    assert runner.status(WANTED).status is InstanceStatus.STOPPED
    assert world.processes() == []


def test_who_ignores_term_is_killed_with_all_its_children(world: World) -> None:
    runner, seen = world.started("ignore-term", "child", "daemon", stop_grace_seconds=0.3)
    assert len(world.processes()) == 3
    assert len(seen.pids) == 2

    runner.stop(WANTED)

    assert world.processes() == []


def test_a_server_that_is_killed_is_an_error_and_its_children_go_with_the_next_start(world: World) -> None:
    runner, seen = world.started("child")
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGKILL)
    until(lambda: runner.status(WANTED).status is InstanceStatus.ERROR)

    killed = runner.status(WANTED)
    runner.start(WANTED, never)

    assert killed.reason == "It was killed by signal 9 (SIGKILL); still there: 1 of its processes."
    again = runner.status(WANTED)
    assert again.status is InstanceStatus.RUNNING
    assert {process.pid for process in world.processes()} == again.pids
    assert not again.pids & seen.pids


def test_a_server_that_hangs_for_a_while_still_runs(world: World) -> None:
    runner, seen = world.started()
    assert seen.pid is not None
    os.kill(seen.pid, signal.SIGSTOP)

    hanging = runner.status(WANTED)
    os.kill(seen.pid, signal.SIGCONT)

    assert hanging.status is InstanceStatus.RUNNING
    assert f"does not answer on port {seen.port}" in str(hanging.reason)
    assert runner.status(WANTED) == seen


def test_stop_waits_until_the_memory_is_back(world: World) -> None:
    runner, seen = world.started()
    world.memory_mib = [900.0, 900.0]

    runner.stop(WANTED)

    assert world.asked == [(0, seen.pids)] * 3


def test_a_full_log_is_cut_while_the_server_writes_on(world: World) -> None:
    runner, seen = world.started("chatty=2000", log_max_mib=0.01, log_files=2)
    log = world.folder / "place" / "m@0.log"
    old = log.with_name("m@0.log.1")

    assert old.read_text().startswith("line 0 of")
    assert log.stat().st_size < 0.01 * 2**20
    assert requests.get(f"http://127.0.0.1:{seen.port}/{'x' * 70_000}", timeout=10).status_code == 414
    until(lambda: "code 414" in log.read_text())
    assert b"\0" not in log.read_bytes()
    assert [line.partition(" of a ")[0] for line in runner.log(WANTED, 4)[:2]] == ["line 1998", "line 1999"]


def test_the_last_lines_reach_over_old_files_and_show_a_progress_bar_once(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "m.log", max_bytes=10, old=2)
    for text in ("first\n", "50%\r100%\n\xe9nd\n", "x" * 3000 + "\nlast"):
        descriptor = log.open()
        os.write(descriptor, text.encode())
        os.close(descriptor)

    assert log.tail(9) == ["first", "100%", "\xe9nd", "x" * 2000, "last"]
    assert log.tail(3) == ["\xe9nd", "x" * 2000, "last"]
    assert log.last(9) == ["x" * 2000, "last"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"program": "/no/such/vllm"}, "vllm.program: /no/such/vllm is not there"),
        ({"program": "no-such-vllm"}, "vllm.program: no-such-vllm is not there"),
    ],
    ids=["path", "name"],
)
def test_a_program_that_is_missing_is_named_with_its_setting(
    world: World, settings: dict[str, Any], message: str
) -> None:
    runner = world.runner(**settings)

    with pytest.raises(BadRequest, match=message):
        runner.check(WANTED)
    with pytest.raises(StartFailed, match=r"could not be started: .*No such file"):
        runner.start(WANTED, never)
    assert runner.status(WANTED).status is InstanceStatus.STOPPED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_prot": 1}, "Did you mean base_port"),
        ({"arguments": ["--port=1"]}, "must not have --port=1"),
        ({"models": {"m": {"memory_gib": 0}}}, "m.memory_gib: Must be greater than 0"),
        ({"supported_models": "m"}, "a list of names"),
    ],
    ids=["unknown", "own-option", "memory", "no-list"],
)
def test_settings_that_cannot_be_used_are_refused(world: World, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        world.runner(**settings)


def test_models_can_be_a_list_of_names(world: World) -> None:
    assert list(world.runner(supported_models=["m", "n"]).models) == ["m", "n"]


def test_the_worked_example_of_the_docs_is_the_one_that_is_tested() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"

    assert (docs / "examples" / "llama_server.py").read_text() in (docs / "runners.md").read_text()
