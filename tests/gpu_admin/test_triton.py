"""The Triton runner against real tritonservers on CPU, in containers of a small Docker Engine."""

import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gpu_admin.contract import (
    BadRequest,
    Conflict,
    InstanceStatus,
    Place,
    Seen,
    StartFailed,
    Unavailable,
    Wanted,
)
from gpu_admin.runners.triton import Runner, placement
from gpu_admin.settings import SettingsError
from tests.gpu_admin import triton_server
from tests.gpu_admin.fake_docker import IMAGE, NO_NVIDIA, FakeDocker
from tests.gpu_admin.triton_case import make_section
from tests.rig import until

WAIT_S = 60


class Rig:
    """One Docker, one model repository, and runners of as many services as a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "models"
        self.repository.mkdir()
        self.docker = FakeDocker(folder / "docker", triton_server.program())
        #: MiB that every process together holds, whatever the GPU.
        self.memory_mib: Callable[[], float | None] = lambda: None

    def runner(self, *models: str, **settings: object) -> Runner:
        """A runner of a service of its own, for this Docker."""
        self.section = make_section(self.docker, self.repository, *models, **settings)
        return self.again()

    def again(self, **settings: object) -> Runner:
        """A runner of another service process with the same settings."""
        return Runner({**self.section, **settings}, Place(self.folder / "own", lambda gpu, pids: self.memory_mib()))

    def model(self, name: str, *args: object, **settings: object) -> Path:
        return triton_server.write_model(self.repository, name, *args, **settings)  # type: ignore[arg-type]

    def infer(self, name: str) -> requests.Response:
        given = {"name": "INPUT0", "shape": [2], "datatype": "FP32", "data": [1, 2]}
        url = f"http://127.0.0.1:{self.section['http_port']}/v2/models/{name}/infer"
        return requests.post(url, json={"inputs": [given]}, timeout=WAIT_S)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.docker.close()
    assert rig.docker.unknown == []


def never() -> bool:
    return False


def wanted(runner: Runner, model: str = "MAM", gpu_id: int = 0, **config: object) -> Wanted:
    return runner.read_config(model, gpu_id, config)


def failure(runner: Runner, order: Wanted) -> StartFailed:
    with pytest.raises(StartFailed) as caught:
        runner.start(order, never)
    return caught.value


# ---- what is written for Triton


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_each_gpu_gets_a_group_of_its_own_with_its_copies() -> None:
    text = placement.as_text(placement.groups_of({1: 8, 0: 2}, {0: 0, 1: 1}))

    groups = parsed(text).instance_group

    assert [(g.name, g.count, list(g.gpus)) for g in groups] == [("gpu0", 2, [0]), ("gpu1", 8, [1])]
    assert {g.kind for g in groups} == {model_config_pb2.ModelInstanceGroup.KIND_GPU}


def test_a_group_names_the_gpu_by_its_number_in_the_container(rig: Rig) -> None:
    rig.model("MAM", files="template")
    runner = rig.runner("MAM", gpus="device=3,2", model_gpu_configs={"MAM": {"instances_per_gpu": 8}})

    with pytest.raises(BadRequest, match=r"GPUs 2, 3 only"):
        wanted(runner, gpu_id=0)
    [group] = runner._loads.groups("MAM", {3: 8})

    assert group == {"name": "gpu3", "count": 8, "kind": "KIND_GPU", "gpus": [1]}
    assert placement.read_groups([group], (2, 3)) == {3: 8}


def test_placements_that_others_made_are_read_too() -> None:
    others = [{"name": "MAM_0", "kind": "KIND_GPU", "count": 8, "gpus": [0, 1]}, {"kind": "KIND_CPU", "count": 1}]

    assert placement.read_groups(others, None) == {0: 8, 1: 8}


@pytest.mark.parametrize("files", ["template", "bare"])
def test_a_template_becomes_the_configuration_with_or_without_a_placeholder(rig: Rig, files: str) -> None:
    folder = rig.model("MAM", files=files)

    carried = placement.ModelFolder(rig.repository, "MAM").place(placement.groups_of({0: 3}, None))

    config = parsed((folder / "config.pbtxt").read_text())
    assert carried is None
    assert (config.name, [(g.name, g.count) for g in config.instance_group]) == ("MAM", [("gpu0", 3)])


def test_a_configuration_without_a_template_is_carried_by_the_load_and_stays_as_it_is(rig: Rig) -> None:
    folder = rig.model("MAM", files="config")
    before = (folder / "config.pbtxt").read_text()

    carried = placement.ModelFolder(rig.repository, "MAM").place(placement.groups_of({1: 2}, {1: 1}))

    assert carried is not None
    said = json.loads(carried)
    assert (said["backend"], said["input"][0]["dims"]) == ("python", ["-1"])
    assert said["instance_group"] == [{"name": "gpu1", "count": 2, "kind": "KIND_GPU", "gpus": [1]}]
    assert (folder / "config.pbtxt").read_text() == before


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        pytest.param('backend: "python"\ninstance_group [ { count: 1 } ]', "instance_group of its own", id="own-group"),
        pytest.param("instance_group [ ${instance_group} ]", "no model configuration", id="placeholder-in-brackets"),
        pytest.param("${instance_group} ${instance_group}", "instance_group of its own", id="placeholder-twice"),
        pytest.param("backend python", "no model configuration", id="not-pbtxt"),
    ],
)
def test_a_wrong_template_is_refused_by_name_before_anything_is_written(rig: Rig, template: str, rule: str) -> None:
    folder = rig.model("MAM", template=template)
    runner = rig.runner("MAM")

    with pytest.raises(BadRequest, match=rule) as caught:
        runner.check(wanted(runner))

    assert "config.pbtxt.template" in caught.value.detail
    assert not (folder / "config.pbtxt").exists()


@pytest.mark.parametrize("linked", ["folder", "template"])
def test_links_out_of_the_repository_are_refused(rig: Rig, tmp_path: Path, linked: str) -> None:
    outside = tmp_path / "elsewhere"
    folder = triton_server.write_model(outside, "MAM", files="template")
    if linked == "folder":
        (rig.repository / "MAM").symlink_to(folder)
    else:
        (rig.model("MAM", files="none") / "config.pbtxt.template").symlink_to(folder / "config.pbtxt.template")
    runner = rig.runner("MAM")

    with pytest.raises(BadRequest, match="outside of the model repository"):
        runner.check(wanted(runner))


def test_a_model_without_a_folder_is_refused_by_name(rig: Rig) -> None:
    runner = rig.runner("MAM")

    with pytest.raises(BadRequest, match="has no folder MAM"):
        runner.check(wanted(runner))


def test_a_full_disk_fails_the_start_and_leaves_the_old_configuration(rig: Rig) -> None:
    folder = rig.model("MAM", files="template")
    (folder / "config.pbtxt").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(StartFailed, match=r"cannot be written: .*File too large"):
            rig.runner("MAM")._loads._prepare("MAM", {0: 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert (folder / "config.pbtxt").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt", "config.pbtxt.template"]


# ---- settings and requests


def test_the_seeds_settings_are_the_defaults(tmp_path: Path) -> None:
    runner = Runner({}, Place(tmp_path, lambda gpu, pids: None))

    assert {name: model.instances_per_gpu for name, model in runner.models.items()} == {"MAM": 8, "FastFitAll": 1}


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"http_prot": 1}, "Did you mean http_port"),
        ({"model_gpu_configs": {"MAM": {"instances_per_gpu": 65}}}, r"triton.model_gpu_configs.*MAM.*1 and"),
        ({"supported_models": ["../etc"]}, "triton.supported_models"),
        ({"grpc_port": 8000}, "must differ"),
        ({"gpus": "GPU-1"}, "device=0,1"),
        ({"listen": "everywhere"}, "triton.listen"),
        ({"shm_size": "lots"}, "triton.shm_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: dict[str, object], rule: str) -> None:
    with pytest.raises(SettingsError, match=rule):
        Runner(settings, Place(tmp_path, lambda gpu, pids: None))


@pytest.mark.parametrize(
    "config",
    [{"instances": 4}, {"volumes": ["/:/host"]}, {"instances_per_gpu": 0}, {"instances_per_gpu": True}],
    ids=["near", "mount", "zero", "bool"],
)
def test_only_a_number_of_copies_may_come_from_a_request(rig: Rig, config: dict[str, object]) -> None:
    runner = rig.runner("MAM")

    with pytest.raises(BadRequest, match=rf"^config\.{next(iter(config))}: "):
        runner.read_config("MAM", 0, config)
    assert runner.read_config("MAM", 0, {"instances_per_gpu": 1}) == runner.read_config("MAM", 0, {})


# ---- looks before a start


def test_docker_that_is_away_or_silent_is_said_at_once(rig: Rig) -> None:
    rig.model("MAM", files="template")
    runner = rig.runner("MAM")
    rig.docker.down()
    with pytest.raises(Unavailable, match="Docker does not answer"):
        runner.check(wanted(runner))
    rig.docker.up()
    rig.docker.freeze()
    with pytest.raises(Unavailable, match="Docker does not answer"):
        runner.check(wanted(runner))
    rig.docker.thaw()

    runner.check(wanted(runner))


def test_a_port_in_use_is_named_with_its_setting(rig: Rig) -> None:
    rig.model("MAM", files="template")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        runner = rig.runner("MAM", grpc_port=port)

        with pytest.raises(Conflict, match=rf"Port {port} .*triton\.grpc_port"):
            runner.check(wanted(runner))


def test_a_stopped_container_of_somebody_elses_is_left_alone(rig: Rig) -> None:
    rig.model("MAM", files="template")
    rig.docker.answer(
        "POST", "/containers/create", {"name": "triton_server"}, {"Image": IMAGE, "Cmd": ["sleep"], "Tty": False}
    )
    runner = rig.runner("MAM")

    with pytest.raises(Conflict, match="docker rm triton_server"):
        runner.check(wanted(runner))
    assert "not made here" in failure(runner, wanted(runner)).reason
    assert len(rig.docker.containers) == 1


def test_without_nvidias_runtime_no_half_made_container_is_left(rig: Rig) -> None:
    rig.model("MAM", files="template")
    rig.docker.nvidia = False
    runner = rig.runner("MAM", gpus="all", model_gpu_configs={})

    failed = failure(runner, wanted(runner))

    assert NO_NVIDIA in failed.reason
    assert rig.docker.containers == {}


def test_a_missing_image_is_fetched_and_said(rig: Rig) -> None:
    rig.model("MAM", files="template")
    rig.docker.images.clear()
    rig.docker.pull_s = 0.5
    runner = rig.runner("MAM")
    failed: list[StartFailed] = []
    start = threading.Thread(target=lambda: failed.append(failure(runner, wanted(runner))))
    start.start()

    fetching = Seen(InstanceStatus.STARTING, f"Docker fetches the image {IMAGE}.")
    until(lambda: runner.status(wanted(runner)) == fetching, WAIT_S)
    start.join()

    assert "manifest unknown" in failed[0].reason
    assert runner.status(wanted(runner)) == Seen(InstanceStatus.STOPPED)


# ---- with a server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A Docker with a container in which MAM serves on GPU 0; tests leave it so."""
    rig = Rig(tmp_path_factory.mktemp("served"))
    try:
        rig.model("MAM", files="template")
        rig.model("broken", "crashing", files="config")
        rig.model("slow", "slow", files="config", seconds=0.6)
        rig.model("hanging", "hanging", files="template")
        runner = rig.runner("MAM", "broken", "slow", "hanging", shm_size="64m", gpus="device=1,0")
        runner.start(wanted(runner), never)
        yield rig
    finally:
        rig.docker.close()
    assert rig.docker.unknown == []


def test_the_container_is_made_as_the_settings_say(served: Rig) -> None:
    [container] = served.docker.running()
    ports = {key: served.section[key] for key in ("http_port", "grpc_port", "metrics_port")}

    assert container.config["Cmd"] == [
        "tritonserver",
        "--model-repository=/models",
        "--model-control-mode=explicit",
        *(f"--{key.replace('_', '-')}={port}" for key, port in ports.items()),
        "--exit-timeout-secs=10",
    ]
    assert container.host_config["Binds"] == [f"{served.repository}:/models:rw"]
    assert container.host_config["ShmSize"] == 64 << 20
    [devices] = container.host_config["DeviceRequests"]
    assert (devices["DeviceIDs"], devices["Capabilities"]) == (["0", "1"], [["gpu"]])
    assert container.host_config["PortBindings"] == {
        f"{port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}] for port in ports.values()
    }


def test_a_second_gpu_comes_and_goes_while_clients_are_served(served: Rig) -> None:
    runner, elsewhere = served.again(), served.again()
    first, second = wanted(runner), wanted(runner, gpu_id=1)
    stopped, answers, holds_mib = threading.Event(), [], [900.0, 900.0, 900.0, 100.0]
    served.memory_mib = lambda: holds_mib.pop(0)

    def ask() -> None:
        while not stopped.wait(0.05):
            answers.append(served.infer("MAM").status_code)

    client = threading.Thread(target=ask)
    client.start()
    try:
        elsewhere.start(second, never)
        both = [(seen.status, seen.copies) for seen in map(runner.status, (first, second))]
        runner.stop(second)
    finally:
        stopped.set()
        client.join()
        served.memory_mib = lambda: None

    assert both == [(InstanceStatus.RUNNING, 1), (InstanceStatus.RUNNING, 1)]
    assert [runner.status(order).status for order in (first, second)] == [
        InstanceStatus.RUNNING,
        InstanceStatus.STOPPED,
    ]
    assert set(answers) == {200}
    assert holds_mib == [], "stop did not wait until the memory was back"


def test_a_model_that_fails_says_why_and_leaves_the_others_alone(served: Rig) -> None:
    runner = served.again()
    mam, broken = wanted(runner), wanted(runner, "broken")

    failed = failure(runner, broken)
    seen = runner.status(broken)

    assert triton_server.CRASH in failed.reason
    assert failed.log
    assert seen.status is InstanceStatus.STOPPED
    assert triton_server.CRASH in (seen.reason or "")
    assert runner.status(mam).status is InstanceStatus.RUNNING


def test_another_service_process_adopts_what_runs(served: Rig) -> None:
    [container] = served.docker.running()
    again = served.again()
    again.start(wanted(again), never)

    seen = again.status(wanted(again))

    assert (seen.status, seen.pid, seen.port) == (
        InstanceStatus.RUNNING,
        container.pid,
        served.section["http_port"],
    )
    assert container.pid in seen.pids
    assert len(seen.pids) >= 2
    assert len(again.log(wanted(again), 5)) == 5
    assert served.docker.running() == [container]


def test_an_abandoned_start_returns_at_once_and_stop_clears_up(served: Rig) -> None:
    runner = served.again()
    order = wanted(runner, "slow")

    runner.start(order, lambda: runner.status(order).status is InstanceStatus.STARTING)
    abandoned = runner.status(order).status
    runner.stop(order)

    assert abandoned is InstanceStatus.STARTING
    assert runner.status(order).status is InstanceStatus.STOPPED


def test_models_serve_on_while_docker_is_away(served: Rig) -> None:
    runner = served.again()
    served.docker.down()
    try:
        seen = runner.status(wanted(runner))
        with pytest.raises(Unavailable, match="Docker does not answer"):
            runner.stop(wanted(runner))
    finally:
        served.docker.up()

    assert seen.status is InstanceStatus.RUNNING
    assert "Docker does not answer" in (seen.reason or "")
    assert runner.status(wanted(runner)).reason is None


def test_a_server_that_is_silent_is_no_server_that_runs(served: Rig) -> None:
    runner = served.again()
    [container] = served.docker.running()
    os.kill(container.pid, signal.SIGSTOP)
    try:
        seen = runner.status(wanted(runner))
    finally:
        os.kill(container.pid, signal.SIGCONT)

    assert seen.status is InstanceStatus.ERROR
    assert "did not answer within" in (seen.reason or "")


def test_a_load_that_hangs_ends_at_its_deadline_and_the_rest_goes_on(served: Rig) -> None:
    runner = served.again(load_timeout_seconds=1)
    mam, hanging = wanted(runner), wanted(runner, "hanging")

    failed = failure(runner, hanging)
    statuses = [runner.status(order).status for order in (mam, hanging)]
    with pytest.raises(Unavailable, match="still loads hanging"):
        runner.stop(hanging)

    assert failed.reason == "Triton did not end loading hanging within 1 s."
    assert statuses == [InstanceStatus.RUNNING, InstanceStatus.STARTING]
    assert served.infer("MAM").ok


def test_a_hanging_load_that_is_alone_takes_its_container_with_it(rig: Rig) -> None:
    rig.model("hanging", "hanging", files="none")
    runner = rig.runner("hanging", load_timeout_seconds=1)

    failed = failure(runner, wanted(runner, "hanging"))

    assert "within 1 s" in failed.reason
    assert rig.docker.containers == {}


def test_a_server_that_is_killed_while_it_loads_is_said_before_the_deadline(rig: Rig) -> None:
    rig.model("hanging", "hanging", files="none")
    runner = rig.runner("hanging")
    order = wanted(runner, "hanging")
    failed: list[StartFailed] = []
    start = threading.Thread(target=lambda: failed.append(failure(runner, order)))
    start.start()
    until(lambda: runner.status(order).status is InstanceStatus.STARTING, WAIT_S)
    [container] = rig.docker.running()

    os.kill(container.pid, signal.SIGKILL)
    start.join(WAIT_S)

    assert "ended with code 137 (signal 9)" in failed[0].reason
    assert failed[0].log
    assert rig.docker.containers == {}


def test_a_container_that_was_killed_says_so_and_is_cleared_away(rig: Rig) -> None:
    rig.model("MAM", files="template")
    runner = rig.runner("MAM")
    order = wanted(runner)
    runner.start(order, never)
    [container] = rig.docker.running()
    os.kill(container.pid, signal.SIGKILL)
    until(lambda: not container.running, WAIT_S)

    seen = runner.status(order)
    runner.stop(order)

    assert seen == Seen(InstanceStatus.ERROR, "The container triton_server ended with code 137 (signal 9).")
    assert rig.docker.containers == {}
    runner.stop(order)


def test_services_that_start_and_stop_at_once_share_one_container(rig: Rig) -> None:
    rig.model("MAM", files="none")
    rig.model("FastFitAll", files="config")
    runner = rig.runner("MAM", "FastFitAll")
    orders = [wanted(runner), wanted(runner, "FastFitAll")]
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(rig.again().start, order, never) for order in orders]
    for start in starts:
        start.result()

    seen = [runner.status(order).status for order in orders]
    with ThreadPoolExecutor() as pool:
        stops = [pool.submit(rig.again().stop, order) for order in orders]
    for stop in stops:
        stop.result()

    assert seen == [InstanceStatus.RUNNING] * 2
    assert rig.docker.containers == {}
