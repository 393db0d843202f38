"""A server process of the admin API without its HTTP: calls come as lines of JSON, and so do the answers."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_admin.contract import HostError
from gpu_admin.host import open_host
from gpu_admin.settings import RUNNERS, Section, Settings

#: Not that of tests.rig, which loads the whole platform.
ROOT = Path(__file__).resolve().parents[2]


def settings(folder: Path, runner: str, section: Mapping[str, Any], runner_class: str | None = None) -> Settings:
    """The settings of a host with one runner, whose data are in a folder."""
    return Settings(folder, {runner: Section(runner_class or RUNNERS[runner], section)})


class Service:
    """That process, seen from the test."""

    def __init__(self, told: Settings, environ: Mapping[str, str], *, forked: bool = False) -> None:
        """forked: it answers from a fork of the process that made the instances, as a server's worker may."""
        ((name, section),) = told.runners.items()
        self._process = subprocess.Popen(
            [
                *[sys.executable, "-m", "tests.gpu_admin.service"],
                json.dumps([forked, str(told.data_dir), name, dict(section.values), section.runner]),
            ],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def begin(self, call: str, *arguments: Any) -> None:
        """Ask it to call a method of Instances."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, *arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> list[str]:
        """The states of the instances that it answered with, or the error's detail."""
        found = self._answer()
        assert isinstance(found, list), found
        return found

    def call(self, call: str, *arguments: Any) -> list[str]:
        """Ask, and wait for the answer."""
        self.begin(call, *arguments)
        return self.end()

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        # Its fork ends at the end of its input.
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the service ended"
        return json.loads(line)


def _serve() -> None:
    forked, folder, *told = json.loads(sys.argv[1])
    instances = open_host(settings(Path(folder), *told)).instances
    instances.watch()
    if forked:
        if child := os.fork():
            instances.close()
            os.waitpid(child, 0)
            return
        instances.watch()
    _say("ready")
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        try:
            answer = getattr(instances, call)(*arguments)
            found = [one.seen.status for one in (answer if isinstance(answer, list) else [answer])]
        except HostError as error:
            found = error.detail
        _say(found)


def _say(answer: str | list[str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
