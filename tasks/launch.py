"""`python -m tasks.launch`: a worker process for each device of this host, kept alive until SIGTERM or SIGINT.

Supervisor does the work (start, restart with back-off, stop, reap, read): as the first process of a container it also
reaps whatever its workers leave behind. What it lacks is added here, by overriding its methods: an exit code that means
"do not try again" however soon it comes (supervisor#260), a bound on the back-off (supervisor#1528), a second signal
that ends at once, and workers that do not outlive it.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import urlsplit, urlunsplit

from dotenv import find_dotenv, load_dotenv
from supervisor import events, loggers
from supervisor.datatypes import RestartWhenExitUnexpected
from supervisor.medusa.asyncore_25 import ExitNow
from supervisor.options import ProcessConfig, ProcessGroupConfig, ServerOptions, decode_wait_status, signame
from supervisor.process import Subprocess
from supervisor.states import ProcessStates, SupervisorStates
from supervisor.supervisord import Supervisor

from tasks import bootstrap, devices, logs, routing, settings
from tasks.devices import Seat
from tasks.lifeline import die_with
from tasks.options import EXIT_CONFIG, DirectSettings, SettingsError, WorkerSettings
from tasks.settings import ROOT

#: A worker that ends sooner after its start is started again after a pause: a second, and one more each time.
STEADY_S = 30
#: The longest pause between two starts.
LONGEST_PAUSE_S = 60
#: What a worker may take beyond its drain grace to give jobs back and to free its device.
STOP_MARGIN_S = 20
#: A line that is longer is shown in pieces.
LONGEST_LINE = 65_536
#: The name in front of our own lines.
US = "launcher"
_ALWAYS = 2**31
_LIMITS = ("capture_maxbytes", "logfile_maxbytes", "logfile_backups")

_STATES = {
    ProcessStates.STARTING: "starting",
    ProcessStates.RUNNING: "running",
    ProcessStates.STOPPING: "draining",
    ProcessStates.STOPPED: "stopped",
    ProcessStates.BACKOFF: "waiting",
    ProcessStates.EXITED: "ended",
    ProcessStates.FATAL: "stopped",
    ProcessStates.UNKNOWN: "unknown",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One worker process that is to run."""

    #: In front of its lines, and in Celery's node name.
    name: str
    command: tuple[str, ...]
    #: What it has beyond the launcher's own environment.
    environ: Mapping[str, str]


def plan(
    seats: Sequence[Seat], worker: WorkerSettings, *, region: str | None, queues: str | None, host: str
) -> list[Plan]:
    """A worker for each seat; each keeps its name for life, whatever process it is. Raises SettingsError.

    region: None where only the server knows it. queues: Celery's -Q; None leaves them to the worker's settings.
    """
    plans = []
    for index, seat in enumerate(seats):
        name = "-".join(filter(None, (region, seat.label)))
        # A name that the user gave is one worker's; several are told apart by their devices.
        known = worker.name or "-".join(filter(None, (region, host)))
        full = worker.name if worker.name and len(seats) == 1 else f"{known}-{seat.label}"
        command = [sys.executable, "-m", "celery", "--quiet", "-A", "tasks", "worker", "-n", f"{name}@%h"]
        plans.append(
            Plan(
                name,
                (*command, *(("-Q", queues) if queues else ())),
                {**seat.environ, "GPU_NAME": full, **_direct(worker.direct, index, len(seats))},
            )
        )
    return plans


def _direct(direct: DirectSettings, index: int, count: int) -> dict[str, str]:
    """The port and URL of one of several workers in direct mode: each the next port."""
    if not direct.enabled or count == 1:
        return {}
    if direct.port + index > 65_535:
        raise SettingsError(f"direct.port {direct.port}: {count} workers need as many ports from there.")
    given = {"GPU_DIRECT_PORT": str(direct.port + index)}
    if direct.public_url is not None:
        url = urlsplit(direct.public_url)
        if url.port is None or url.port + count > 65_536:
            raise SettingsError(
                f"direct.public_url needs a port, such as http://gpu.example.com:{direct.port}: each of the {count} "
                "workers of this host listens on its own, the next one each."
            )
        netloc = url.netloc.removesuffix(f":{url.port}") + f":{url.port + index}"
        given["GPU_DIRECT_PUBLIC_URL"] = urlunsplit(url._replace(netloc=netloc))
    return given


class Screen:
    """Lines with the name of who said them in front, or JSON objects, as they said them or made of what they said."""

    def __init__(self, width: int, as_json: bool = False) -> None:
        self._width = width
        self._as_json = as_json
        self._begun: defaultdict[str, bytes] = defaultdict(bytes)

    def show(self, name: str, line: str) -> None:
        """Print one line."""
        # The terminal or the reader of our pipe may be gone; that is no reason to stop serving.
        with contextlib.suppress(OSError):
            print(self._object(name, line) if self._as_json else f"{name:<{self._width}} | {line}", flush=True)  # noqa: T201

    def hear(self, name: str, data: bytes) -> None:
        """Print what completes a line."""
        *lines, rest = (self._begun[name] + data).split(b"\n")
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        self._begun[name] = rest
        for line in lines:
            # A progress bar draws over itself; the last state of it is enough.
            self.show(name, line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))

    @staticmethod
    def _object(name: str, line: str) -> str:
        if line.startswith('{"') and line.endswith("}"):
            return line
        now = datetime.now(UTC).isoformat()
        return json.dumps({"time": now, "level": "INFO", "logger": name, "message": line}, ensure_ascii=False)

    def end(self, name: str) -> None:
        """Print a line that will not be completed."""
        if self._begun[name]:
            self.hear(name, b"\n")


class WorkerProcess(Subprocess):
    """One worker, over all its restarts."""

    #: How often it failed to stay up since it last did, and the seconds of the pause after it.
    backoff: int

    def __init__(self, config: "WorkerConfig") -> None:
        super().__init__(config)
        self.backoff = 0
        self.starts = 0
        #: It had to be killed.
        self.killed = False
        #: How its last process ended, in words; empty while it runs.
        self.how = ""
        self._parent = os.getpid()

    @property
    def refused(self) -> bool:
        """It cannot start as configured, and is not started again."""
        return bool(self.state == ProcessStates.EXITED and self.exitstatus == EXIT_CONFIG)

    def spawn(self) -> int | None:
        """Start a process; None if that failed."""
        self.how = ""
        self.config.startsecs = STEADY_S
        self.starts += 1
        pid: int | None = super().spawn()
        if pid:
            self._tell()
        return pid

    def _spawn_as_child(self, filename: str, argv: Sequence[str]) -> None:
        die_with(self._parent)
        super()._spawn_as_child(filename, argv)

    def kill(self, sig: int) -> str | None:
        """Send it a signal that is to end it; an error message if that failed."""
        if sig == signal.SIGKILL and self.pid:
            self.killed = True
        failed: str | None = super().kill(sig)
        return failed

    def finish(self, pid: int, sts: int) -> None:
        """Its process has ended."""
        code, self.how = decode_wait_status(sts)
        if code == EXIT_CONFIG and not self.killing:
            # Else Supervisor starts it again whatever the code, since it ended so soon.
            self.config.startsecs = 0
        self.drain()
        self.config.screen.end(self.config.name)
        super().finish(pid, sts)

    def change_state(self, new_state: int, expected: bool = True) -> None:
        """Go to a state, and say so."""
        if new_state == ProcessStates.BACKOFF:
            # Supervisor adds one.
            self.backoff = min(self.backoff, LONGEST_PAUSE_S - 1)
        changed = new_state != self.state
        super().change_state(new_state, expected)
        # Supervisor passes through RUNNING when a process ends, and through STARTING before there is one.
        if changed and new_state != ProcessStates.STARTING and not (new_state == ProcessStates.RUNNING and self.how):
            self._tell()

    def _tell(self) -> None:
        running = self.pid and not self.how
        said = [f"{self.config.name}: {'refused' if self.refused else _STATES[self.state]}"]
        said.append(f"pid {self.pid}" if running else self.how or self.spawnerr or "not started")
        said.append(f"restarts {max(self.starts - 1, 0)}")
        if self.refused:
            said.append("it cannot start as configured and is not started again: see above")
        elif self.state == ProcessStates.BACKOFF:
            said.append(f"again in {self.backoff} s")
        self.config.screen.show(US, ", ".join(said))


class WorkerConfig(ProcessConfig):
    """What Supervisor is told about one worker."""

    def __init__(self, options: ServerOptions, told: Plan, stop_s: int, screen: Screen) -> None:
        # Its output goes to the screen alone, and nothing about the process changes but its environment.
        unset = dict.fromkeys(("uid", "directory", "umask", "serverurl"))
        for stream in ("stdout", "stderr"):
            unset |= dict.fromkeys(f"{stream}_{what}" for what in ("logfile", "syslog"))
            unset |= dict.fromkeys((f"{stream}_{what}" for what in _LIMITS), 0)
        super().__init__(
            options,
            **unset,
            name=told.name,
            command=shlex.join(told.command),
            environment=told.environ,
            priority=0,
            autostart=True,
            autorestart=RestartWhenExitUnexpected,
            exitcodes=[EXIT_CONFIG],
            startsecs=STEADY_S,
            startretries=_ALWAYS,
            stopsignal=signal.SIGTERM,
            stopwaitsecs=stop_s,
            stopasgroup=False,
            killasgroup=True,
            redirect_stderr=True,
            stdout_events_enabled=True,
            stderr_events_enabled=False,
        )
        self.screen = screen

    def make_process(self, group: object = None) -> WorkerProcess:
        """The worker that Supervisor keeps."""
        process = WorkerProcess(self)
        process.group = group
        return process


class Launcher(Supervisor):
    """Supervisor with our workers and nothing else: no configuration file, pid file, HTTP server or log file."""

    def __init__(self, plans: Sequence[Plan], stop_s: int, screen: Screen) -> None:
        options = ServerOptions()
        options.configfile = io.StringIO("[supervisord]\nnodaemon=true\n")
        options.realize(args=[])
        # What its own main program sets: it is to run for ever.
        options.test = False
        # What happens to a worker is said by us; only what surprises Supervisor itself is left.
        options.logger = loggers.getLogger(loggers.LevelsByName.ERRO)
        loggers.handle_stdout(options.logger, f"{US} | %(message)s\n")
        super().__init__(options)
        self._screen = screen
        configs = [WorkerConfig(options, told, stop_s, screen) for told in plans]
        self.add_process_group(ProcessGroupConfig(options, "workers", 0, configs))

    @property
    def workers(self) -> list[WorkerProcess]:
        """Every worker, whatever its state."""
        return [process for group in self.process_groups.values() for process in group.processes.values()]

    def run(self) -> int:
        """Keep them alive until a signal, or until none is left that could be; the exit code of this process."""
        events.subscribe(events.ProcessLogEvent, self._hear)
        hangup = signal.getsignal(signal.SIGHUP)
        self.options.setsignals()
        if hangup is signal.SIG_IGN:
            # Started with nohup: it is to outlive its terminal.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with contextlib.suppress(ExitNow):
                self.runforever()
        finally:
            self.options.cleanup()
        if all(worker.refused for worker in self.workers):
            self._screen.show(US, "no worker is left: none can start as configured")
            return EXIT_CONFIG
        return 1 if any(worker.killed for worker in self.workers) else 0

    def tick(self, now: float | None = None) -> None:
        """Called in every round."""
        super().tick(now)
        if all(worker.refused for worker in self.workers):
            self.options.mood = SupervisorStates.SHUTDOWN

    def handle_signal(self) -> None:
        """Drain at the first signal to end, kill at the second."""
        number = self.options.get_signal()
        # A terminal that is closed ends what runs in it.
        if number not in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            return
        if self.options.mood == SupervisorStates.RUNNING:
            self._screen.show(US, f"{signame(number)}: the workers drain; a second one ends them at once")
            self.options.mood = SupervisorStates.SHUTDOWN
            return
        self._screen.show(US, f"{signame(number)} again: the workers are killed")
        for worker in self.workers:
            worker.kill(signal.SIGKILL)

    def _hear(self, event: events.ProcessLogEvent) -> None:
        self._screen.hear(event.process.config.name, event.data)


def _region(worker: WorkerSettings, queues: str | None) -> str | None:
    """What the workers are named after: the region of their queues, else of their settings; None if the server says."""
    if queues:
        try:
            return routing.split_queue(queues.partition(",")[0])[0]
        except ValueError as error:
            raise SettingsError(f"-Q {queues}: name queues as region.type, such as asia-east.llm.") from error
    if bootstrap.asks_server(os.environ, worker):
        return worker.region
    told = settings.effective(os.environ)
    return settings.default_region(told, settings.load_regions(told))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after every worker has drained, 1 if one had to be killed, 78 if none can start as configured."""
    parser = argparse.ArgumentParser("python -m tasks.launch", description="A worker for each device of this host.")
    parser.add_argument(
        "--devices",
        help="GPUs by number, such as 0,1; all; or cpu, once per worker. Default: GPU_DEVICE_ID, else every GPU that "
        "NVML shows, else cpu.",
    )
    parser.add_argument("-Q", "--queues", help="as Celery's: instead of GPU_REGION and GPU_SUPPORTED_TYPES")
    asked = parser.parse_args(arguments)
    load_dotenv(find_dotenv(usecwd=True))
    try:
        as_json = logs.is_json(os.environ)
        worker = settings.load_worker(os.environ)
        seats = devices.here(asked.devices, worker.device_id)
        plans = plan(
            seats, worker, region=_region(worker, asked.queues), queues=asked.queues, host=socket.gethostname()
        )
    except SettingsError as error:
        sys.stderr.write(f"The workers cannot start: {error}\n")
        return EXIT_CONFIG
    # The workers run in this folder, so that relative paths mean what they mean here; the code is found from any.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    plans = [replace(told, environ={"PYTHONPATH": path, **told.environ}) for told in plans]
    screen = Screen(max(len(name) for name in (US, *(told.name for told in plans))), as_json)
    return Launcher(plans, int(worker.drain_grace_s) + STOP_MARGIN_S, screen).run()


if __name__ == "__main__":
    sys.exit(main())
