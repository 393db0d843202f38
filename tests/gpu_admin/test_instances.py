"""Orders and how they are carried out, with a small real runner: its servers are `sleep` processes."""

import json
import logging
import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gpu_admin import whole_file
from gpu_admin.contract import Conflict, HostError, InstanceStatus, NotFound, Place, Unavailable, Wanted
from gpu_admin.gpus import Gpus
from gpu_admin.instances import Instances
from gpu_admin.orders import Order, Orders, Phase
from tests.gpu_admin.nvml import Card, Held, NvmlStub
from tests.gpu_admin.service import Service, settings
from tests.gpu_admin.sleepers import Runner
from tests.rig import until

STARTING, RUNNING, STOPPED, ERROR = InstanceStatus
MODELS = {"small": 1.0, "large": 20.0, "larger": 20.0, "unstated": None, "broken": None, "odd": None}


@pytest.fixture
def gpus(nvml: NvmlStub) -> Gpus:
    nvml.write([Card(), Card()])
    return Gpus()


@pytest.fixture
def runner(tmp_path: Path, gpus: Gpus) -> Iterator[Runner]:
    # Where any process of this host has it.
    runner = Runner({"models": MODELS}, Place(tmp_path / "runners" / "sleepers", gpus.memory_mib))
    yield runner
    runner.close()


@pytest.fixture
def instances(runner: Runner, gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instances]:
    """They are not looked after: a test says when."""
    monkeypatch.setattr("gpu_admin.keeper.LOOK_S", 0.1)
    monkeypatch.setattr("gpu_admin.keeper.PAUSE_S", 0.2)
    instances = Instances({"sleepers": runner}, gpus, tmp_path)
    yield instances
    instances.close()


def _next(runner: Runner, folder: Path) -> Instances:
    """The same host in the service's next process."""
    return Instances({"sleepers": runner}, Gpus(), folder)


def _up(instances: Instances, model_name: str = "small", gpu_id: int = 0) -> int:
    """Start a model; its process once it runs."""
    instances.start(model_name, gpu_id, {})
    until(lambda: _order(instances, model_name)["phase"] == "up")
    pid = instances.of(model_name)[0].seen.pid
    assert pid is not None
    return pid


def _order(instances: Instances, model_name: str) -> dict[str, object]:
    """What the file says of a model."""
    orders = json.loads((instances._folder / "wanted.json").read_text())["instances"]
    return next(order for order in orders if order["model_name"] == model_name)


def _gate(runner: Runner, model_name: str) -> Path:
    gate = runner.folder / f"gate-{model_name}"
    gate.touch()
    return gate


def test_threads_that_start_it_at_once_start_one(instances: Instances, runner: Runner) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: instances.start("small", 0, {}).seen.status, range(8)))

    assert set(answers) <= {STARTING, RUNNING}
    until(lambda: [one.seen.status for one in instances.all()] == [RUNNING])
    assert runner.events("spawned") == ["spawned small@0"]


def test_orders_given_at_once_are_all_kept(instances: Instances, runner: Runner) -> None:
    wanted = [(model_name, gpu_id) for model_name in ("small", "unstated", "broken") for gpu_id in (0, 1)]
    together = threading.Barrier(len(wanted))

    def start(one: tuple[str, int]) -> None:
        together.wait(10)
        instances.start(*one, {})

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(start, wanted))

    assert sorted((one.wanted.model_name, one.wanted.gpu_id) for one in instances.all()) == sorted(wanted)


def test_of_two_configs_at_once_one_is_refused(
    instances: Instances, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have seen that nothing is there.
    together = threading.Barrier(2)
    passed = set[int]()

    def check(_: Wanted) -> None:
        if threading.get_ident() not in passed:
            passed.add(threading.get_ident())
            together.wait(10)

    monkeypatch.setattr(runner, "check", check)
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(instances.start, "small", 0, config) for config in ({}, {"gpus": [1]})]
        (refused,) = filter(None, [start.exception() for start in starts])

    assert isinstance(refused, Conflict)
    assert len(instances.all()) == 1


def test_an_order_that_somebody_works_on_is_left_to_them(instances: Instances, runner: Runner) -> None:
    gate = _gate(runner, "small")
    instances.start("small", 0, {})
    until(lambda: runner.events("spawned"))
    with Orders(instances._folder).changing() as orders:
        orders["unstated@0"] = Order("sleepers", Wanted("unstated", (0,)))

    other = _next(runner, instances._folder)
    other.watch()

    # It looks at them in their order.
    until(lambda: _order(instances, "unstated")["phase"] == "up")
    other.close()
    assert runner.events("entered") == ["entered small@0", "entered unstated@0"]
    gate.unlink()


def test_starts_at_once_do_not_both_get_the_last_memory(instances: Instances, runner: Runner) -> None:
    _gate(runner, "large")

    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(instances.start, model_name, 0, {}) for model_name in ("large", "larger")]
        (refused,) = filter(None, [start.exception() for start in starts])

    assert "20.0 more are promised to large" in str(refused)
    assert len(instances.all()) == 1


def test_the_guard_counts_what_a_model_holds_and_can_be_told_to_let_go(
    instances: Instances, runner: Runner, nvml: NvmlStub
) -> None:
    pid = _up(instances)
    nvml.write([Card(), Card()], [Held(pid, 512), Held(1, 4096)])

    with pytest.raises(Conflict) as refused:
        instances.start("large", 0, {})
    assert refused.value.detail == (
        "large needs 20.0 GiB on GPU 0. Of its 24.0 GiB, 4.5 are in use and 0.5 more are promised to small, "
        'which has not taken them yet: 19.0 are left. Stop something first, or send "force": true.'
    )
    assert instances.of("large") == []
    assert instances.all()[0].memory_mib == 512

    assert instances.start("large", 1, {}).seen.status is STARTING
    assert instances.start("large", 0, {}, force=True).seen.status is STARTING


def test_another_config_is_refused_beside_what_runs(instances: Instances) -> None:
    instances.start("small", 0, {"gpus": [1]})

    # As JSON has it, and on any GPU of the set.
    assert instances.start("small", 0, {"gpus": [1]}).wanted.gpu_ids == (0, 1)
    for gpu_id in (0, 1):
        with pytest.raises(Conflict, match="GPU 0 and 1 is there already"):
            instances.start("small", gpu_id, {})
    assert instances.stop("small", 1).wanted.gpu_ids == (0, 1)
    assert instances.all() == []


@pytest.mark.parametrize(
    ("model_name", "reason", "log"),
    [
        ("broken", "Its weights are torn.", ("line 1", "line 2")),
        ("odd", "ZeroDivisionError: by a runner with a mistake", ("odd@0 says 0", "odd@0 says 1", "odd@0 says 2")),
    ],
    ids=["said", "unforeseen"],
)
def test_a_failure_is_kept_with_its_log_and_tried_again_when_asked(
    instances: Instances, runner: Runner, model_name: str, reason: str, log: tuple[str, ...]
) -> None:
    instances.start(model_name, 0, {})
    until(lambda: instances.all()[0].seen.status is ERROR)

    # Another process knows it, too.
    (failed,) = _next(runner, instances._folder).of(model_name)
    assert (failed.seen.reason, failed.log) == (reason, log)
    assert instances.start(model_name, 0, {}).seen.status is STARTING
    until(lambda: instances.all()[0].seen.status is ERROR)
    assert instances.stop(model_name, 0).seen.status is STOPPED


def test_a_stop_lets_a_start_in_another_process_go(instances: Instances, runner: Runner) -> None:
    _gate(runner, "small")
    instances.start("small", 0, {})
    until(lambda: instances.pids())
    (pid,) = instances.pids()

    stopped = _next(runner, instances._folder).stop("small", 0)

    assert stopped.seen.status is STOPPED
    # One after the other.
    assert runner.events() == ["entered small@0", "spawned small@0", "left small@0", "stopped small@0"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert instances.all() == []


def test_what_a_closed_process_was_starting_is_taken_up(instances: Instances, runner: Runner) -> None:
    gate = _gate(runner, "small")
    instances.start("small", 0, {})
    until(lambda: instances.pids())
    instances.close()
    assert _order(instances, "small")["phase"] == "starting"
    gate.unlink()

    after = _next(runner, instances._folder)
    after.watch()
    after.watch()
    until(lambda: _order(instances, "small")["phase"] == "up")
    after.close()

    assert runner.events("spawned") == ["spawned small@0"]


def test_what_cannot_be_stopped_stays_to_be_stopped(instances: Instances, runner: Runner) -> None:
    _up(instances)
    (runner.folder / "away").touch()
    instances.watch()

    with pytest.raises(Unavailable, match="away"):
        instances.stop("small", 0)
    (still,) = instances.all()
    assert (still.seen.status, still.seen.reason) == (RUNNING, "The engine is away.")
    with pytest.raises(Conflict, match="is being stopped"):
        instances.start("small", 0, {})

    (runner.folder / "away").unlink()
    until(lambda: instances.all() == [])
    assert instances.pids() == frozenset()


@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "stays away"])
def test_after_a_reboot_a_start_waits_a_while_for_what_it_needs(
    instances: Instances, runner: Runner, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    away = runner.folder / "away"
    away.touch()
    with Orders(instances._folder).changing() as orders:
        orders["small@0"] = Order("sleepers", Wanted("small", (0,)), phase=Phase.UP, boot_id="the run before")
    instances.watch()
    until(lambda: instances.all()[0].seen.reason == "The engine is away.")
    assert instances.all()[0].seen.status is STARTING

    if comes_back:
        away.unlink()
        until(lambda: instances.all()[0].seen.status is RUNNING)
        until(lambda: _order(instances, "small")["reason"] is None)
    else:
        monkeypatch.setattr("gpu_admin.keeper.AWAY_S", 0)
        until(lambda: instances.all()[0].seen.status is ERROR)
        assert instances.all()[0].seen.reason == "The engine did not make it."


def test_a_crash_is_written_down_with_its_log_and_nothing_starts_by_itself(
    instances: Instances, runner: Runner
) -> None:
    pid = _up(instances)
    instances.watch()
    os.kill(pid, signal.SIGKILL)

    until(lambda: _order(instances, "small")["phase"] == "failed")

    (gone,) = instances.all()
    assert gone.seen.status is ERROR
    assert "gone" in (gone.seen.reason or "")
    assert gone.log == ("small@0 says 0", "small@0 says 1", "small@0 says 2")
    assert runner.events("spawned") == ["spawned small@0"]


def test_a_model_that_comes_back_is_up_again(instances: Instances, runner: Runner) -> None:
    pid = _up(instances)
    pid_file = runner.folder / "small@0.pid"
    pid_file.rename(runner.folder / "aside")
    instances.watch()
    until(lambda: _order(instances, "small")["phase"] == "failed")

    (runner.folder / "aside").rename(pid_file)

    until(lambda: _order(instances, "small")["phase"] == "up")
    assert [(one.seen.status, one.seen.pid) for one in instances.all()] == [(RUNNING, pid)]


def test_what_ran_before_the_host_was_restarted_is_started_again(instances: Instances, runner: Runner) -> None:
    os.kill(_up(instances), signal.SIGKILL)
    until(lambda: instances.all()[0].seen.status is ERROR)
    path = instances._folder / "wanted.json"
    order = _order(instances, "small")
    whole_file.write(path, path.read_text().replace(str(order["boot_id"]), "the run before"))

    instances.watch()

    until(lambda: instances.all()[0].seen.status is RUNNING)
    until(lambda: _order(instances, "small")["phase"] == "up")
    assert runner.events("spawned") == ["spawned small@0", "spawned small@0"]
    assert _order(instances, "small")["boot_id"] == order["boot_id"]


def test_a_watch_begins_anew_in_a_forked_process(instances: Instances, runner: Runner, nvml: NvmlStub) -> None:
    told = settings(instances._folder, "sleepers", {"models": MODELS}, "tests.gpu_admin.sleepers:Runner")
    service = Service(told, nvml.environ, forked=True)
    try:
        service.call("start", "small", 0, {})
        until(lambda: _order(instances, "small")["phase"] == "up")
        (pid,) = instances.pids()
        os.kill(pid, signal.SIGKILL)

        until(lambda: _order(instances, "small")["phase"] == "failed")
    finally:
        service.kill()


def test_a_torn_file_is_put_aside_and_what_is_known_is_kept(
    instances: Instances, runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    _up(instances)
    path = instances._folder / "wanted.json"
    torn = path.read_text()[:-40]
    path.write_text(torn)

    with caplog.at_level(logging.ERROR):
        assert [one.seen.status for one in instances.all()] == [RUNNING]

    assert (instances._folder / "wanted.broken.json").read_text() == torn
    assert "cannot be understood" in caplog.text
    assert _order(instances, "small")["phase"] == "up"

    # A process that knows nothing goes on with nothing, and a start adopts what runs.
    path.write_text("[]")
    after = _next(runner, instances._folder)
    assert after.all() == []
    after.start("small", 0, {})
    until(lambda: [one.seen.status for one in after.all()] == [RUNNING])
    assert runner.events("spawned") == ["spawned small@0"]
    after.close()


def test_a_full_disk_starts_nothing(instances: Instances, runner: Runner) -> None:
    _up(instances, "unstated")
    before = (instances._folder / "wanted.json").read_text()

    with _full_disk(), pytest.raises(HostError, match="cannot be changed") as refused:
        instances.start("small", 0, {})

    assert refused.value.status == 500
    assert (instances._folder / "wanted.json").read_text() == before
    assert runner.events("spawned") == ["spawned unstated@0"]
    assert [path.name for path in instances._folder.glob(".wanted*")] == []
    with pytest.raises(NotFound):
        instances.stop("small", 0)


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file of this process takes more than a few bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
