"""What must hold for every runner, with its real backend: one suite, taken over by a thin file for each of them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from gpu_admin.contract import BadRequest, InstanceStatus, NotFound
from gpu_admin.host import open_host
from gpu_admin.instances import Instance, Instances
from gpu_admin.settings import Settings
from tests.gpu_admin.cases import Case
from tests.gpu_admin.nvml import Card, NvmlStub
from tests.gpu_admin.service import Service, settings
from tests.rig import until

STARTING, RUNNING, STOPPED, ERROR = InstanceStatus
#: Starts take a second or two, a real ComfyUI's twenty.
UP_S = 90


class Contract:
    """Subclasses name the maker of their case."""

    make_case: ClassVar[Callable[[Path], Case]]

    @pytest.fixture
    def case(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
        folder = tmp_path / "case"
        folder.mkdir()
        case = type(self).make_case(folder)
        for name, value in case.environ.items():
            monkeypatch.setenv(name, value)
        yield case
        case.close()

    @pytest.fixture
    def told(self, case: Case, nvml: NvmlStub, tmp_path: Path) -> Settings:
        nvml.write([Card(), Card()])
        return settings(tmp_path / "data", case.runner, case.section, case.runner_class)

    @pytest.fixture
    def instances(self, told: Settings) -> Iterator[Instances]:
        instances = open_host(told).instances
        instances.watch()
        yield instances
        instances.close()

    @pytest.fixture
    def service(self, told: Settings, case: Case, nvml: NvmlStub) -> Iterator[Service]:
        """Another server process of the same host."""
        service = Service(told, {**nvml.environ, **case.environ})
        yield service
        service.kill()

    def test_what_is_unknown_or_does_not_run_is_said_to_be_so(self, case: Case, instances: Instances) -> None:
        with pytest.raises(BadRequest, match="no model"):
            instances.start(f"{case.model}x", 0, {})
        with pytest.raises(BadRequest, match="gpu_id: 2"):
            instances.start(case.model, 2, {})
        with pytest.raises(BadRequest):
            instances.start(case.model, 0, {"no-such-key": 1})
        for call in (instances.of, lambda name: instances.stop(name, 0), lambda name: instances.log(name, 10)):
            with pytest.raises(NotFound):
                call(f"{case.model}x")
        with pytest.raises(NotFound, match="does not run on GPU 0"):
            instances.stop(case.model, 0)

        assert instances.of(case.model) == instances.all() == []
        assert list(instances.log(case.model, 10)) == []
        assert case.servers() == 0

    def test_models_start_beside_each_other_and_stop_one_by_one(self, case: Case, instances: Instances) -> None:
        first = instances.start(case.model, 0, {})
        assert (first.seen.status, first.runner) == (STARTING, case.runner)
        until(lambda: _states(instances) == {(case.model, 0): RUNNING}, UP_S)

        # Another GPU, and another model on the same one.
        instances.start(case.model, 1, {})
        instances.start(case.other, 0, {})
        three = {(case.model, 0): RUNNING, (case.model, 1): RUNNING, (case.other, 0): RUNNING}
        until(lambda: _states(instances) == three, UP_S)
        servers = case.servers()
        assert all(one.seen.pid in one.seen.pids and one.seen.port for one in instances.all())

        # A second start of what is there.
        assert instances.start(case.model, 0, {}).seen.status is RUNNING
        assert len(instances.of(case.model)) == 2
        assert case.servers() == servers

        assert instances.stop(case.model, 0).seen.status is STOPPED
        assert _states(instances) == {(case.model, 1): RUNNING, (case.other, 0): RUNNING}
        with pytest.raises(NotFound):
            instances.stop(case.model, 0)
        instances.stop(case.other, 0)
        assert instances.stop(case.model, 1).seen.status is STOPPED
        assert instances.all() == []
        assert case.servers() == 0

    def test_a_start_that_fails_says_why_and_can_be_stopped(self, case: Case, instances: Instances) -> None:
        assert instances.start(case.broken, 0, {}).seen.status is STARTING

        until(lambda: instances.of(case.broken)[0].seen.status is ERROR, UP_S)

        (failed,) = instances.all()
        assert re.search(case.broken_reason, failed.seen.reason or ""), failed
        assert instances.stop(case.broken, 0).seen.status is STOPPED
        assert instances.all() == []
        assert case.servers() == 0

    def test_what_a_killed_process_was_starting_is_finished_and_seen_when_it_dies(
        self, case: Case, service: Service, told: Settings
    ) -> None:
        assert service.call("start", case.model, 0, {}) == [STARTING]
        service.kill()

        # The next process.
        instances = open_host(told).instances
        try:
            assert _states(instances).keys() == {(case.model, 0)}
            instances.watch()
            until(lambda: _states(instances) == {(case.model, 0): RUNNING}, UP_S)
            assert case.servers() == 1

            case.kill(instances.all()[0])
            until(lambda: _states(instances) == {(case.model, 0): ERROR}, UP_S)
            assert instances.all()[0].seen.reason

            # It is not started again by itself, but when it is asked for.
            assert instances.start(case.model, 0, {}).seen.status is STARTING
            until(lambda: _states(instances) == {(case.model, 0): RUNNING}, UP_S)
            assert case.servers() == 1
            instances.stop(case.model, 0)
            assert case.servers() == 0
        finally:
            instances.close()

    def test_two_processes_that_start_it_at_once_start_one(
        self, case: Case, service: Service, instances: Instances
    ) -> None:
        service.begin("start", case.model, 0, {})
        ours = instances.start(case.model, 0, {})
        (theirs,) = service.end()

        assert {ours.seen.status, theirs} <= {STARTING, RUNNING}
        until(lambda: _states(instances) == {(case.model, 0): RUNNING}, UP_S)
        until(lambda: service.call("all") == [RUNNING], UP_S)
        assert case.servers() == 1
        # One starts it, the other one stops it.
        assert service.call("stop", case.model, 0) == [STOPPED]
        assert instances.all() == []
        assert case.servers() == 0


def _states(instances: Instances) -> dict[tuple[str, int], InstanceStatus]:
    return {_where(one): one.seen.status for one in instances.all()}


def _where(instance: Instance) -> tuple[str, int]:
    return instance.wanted.model_name, instance.wanted.gpu_id
