"""Runners whose server is a process of this host: one for each instance, with a GPU or a set of them and a port.

A backend is a subclass that states its name, its settings, its command line and when it is ready; everything else is
here: pid files and adoption, ports, logs, deadlines, the end of all its processes. docs/runners.md shows a whole one.
Nothing of a command, a folder or an environment comes from a request but what a backend's `config_schema` lets through.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from gpu_admin import locks, ports, proc
from gpu_admin.contract import (
    BadRequest,
    Conflict,
    InstanceStatus,
    Place,
    Seen,
    StartFailed,
    SupportedModel,
    Unavailable,
    Wanted,
)
from gpu_admin.probe import Probe
from gpu_admin.server_log import ServerLog
from gpu_admin.server_process import PidFile, Server, how_it_ended
from gpu_admin.settings import SettingsError, Strict, near, read_section

logger = logging.getLogger(__name__)

#: How often a starting server is asked whether it is ready.
_LOOK_S = 0.1
#: How long it may take to answer while it starts, and when its status is asked.
_PROBE_S = 1.0
#: How long the driver may take to give back the memory of processes that are gone.
_MEMORY_S = 10.0
#: Lines of its log that go with a failure.
_LAST_LINES = 50

#: What a server gets of this service's environment. All else, such as keys and database URLs, is none of its business:
#: custom nodes and the like are other people's code. The setting `environment` adds what is missing.
_PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
_PASSED_PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TORCH", "PYTORCH_", "OMP_", "MKL_")


def _environment() -> fields.Dict:
    return fields.Dict(keys=fields.String(), values=fields.String(), load_default=dict)


class ModelSettings(Strict):
    """What the operator states of one model."""

    memory_gib = fields.Float(load_default=None, allow_none=True, validate=validate.Range(min=0, min_inclusive=False))
    arguments = fields.List(fields.String(), load_default=list)
    environment = _environment()
    #: Its own port, which lets it run on one GPU at a time; None for the next free one of the range.
    port = fields.Integer(load_default=None, allow_none=True, strict=True, validate=validate.Range(min=1, max=65_535))


class Models(fields.Field[dict[str, dict[str, Any]]]):
    """`supported_models`: a list of names, or a mapping of names to what is stated of each."""

    def __init__(self, schema: type[ModelSettings] = ModelSettings) -> None:
        super().__init__(load_default=dict)
        self._model_schema = schema

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        said = dict.fromkeys(value) if isinstance(value, list) else value
        if not isinstance(said, Mapping):
            raise ValidationError("Must be a list of names, or a mapping of names to settings.")
        loaded = {}
        for name, settings in said.items():
            try:
                loaded[str(name)] = self._model_schema().load({} if settings is None else settings)
            except ValidationError as error:
                raise ValidationError({str(name): error.messages}) from error
        return loaded


class ServerSettings(Strict):
    """The settings that every runner of this kind has; a backend's schema adds its own."""

    supported_models = Models()
    #: The address that servers listen on.
    listen = fields.String(load_default="127.0.0.1", validate=validate.Length(min=1))
    #: Instances get the first free ones of so many ports from here on.
    base_port = fields.Integer(load_default=9000, strict=True, validate=validate.Range(min=1, max=65_535))
    ports = fields.Integer(load_default=64, strict=True, validate=validate.Range(min=1))
    arguments = fields.List(fields.String(), load_default=list)
    environment = _environment()
    start_timeout_seconds = fields.Float(load_default=600, validate=validate.Range(min=0, min_inclusive=False))
    stop_grace_seconds = fields.Float(load_default=15, validate=validate.Range(min=0))
    log_max_mib = fields.Float(load_default=10, validate=validate.Range(min=0, min_inclusive=False))
    log_files = fields.Integer(load_default=3, strict=True, validate=validate.Range(min=0, max=99))


class NoConfig(Schema):
    """A request's `config` that may hold nothing."""

    class Meta:
        unknown = RAISE


class ProcessRunner:
    """A Runner (gpu_admin/contract.py) but for what one backend knows: see the hooks below, and docs/runners.md."""

    #: Stated by each backend.
    name: str
    #: Its settings.
    settings_schema: type[ServerSettings] = ServerSettings
    #: What a request may say in `config`.
    config_schema: type[Schema] = NoConfig
    #: Its setting that names the program, the first word of its command.
    program_setting = "program"
    #: Its setting that names the folder it works in.
    folder_setting = "directory"
    #: Options that the command line has anyway, so that `arguments` may not.
    own_options: tuple[str, ...] = ("--port", "--host")
    #: It serves once this answers 200.
    ready_path = "/health"

    def __init__(self, section: Mapping[str, Any], place: Place) -> None:
        self.settings = read_section(self.settings_schema(), self.name, section)
        self._place = place
        supported: Mapping[str, dict[str, Any]] = self.settings["supported_models"]
        self.models = {name: SupportedModel(name, stated["memory_gib"]) for name, stated in supported.items()}
        for argument in (
            *self.settings["arguments"],
            *(a for stated in supported.values() for a in stated["arguments"]),
        ):
            if argument.partition("=")[0] in self.own_options:
                raise SettingsError(f"{self.name}: arguments must not have {argument}: the runner sets it.")

    def command(self, wanted: Wanted, port: int) -> Sequence[str]:
        """The command line that serves it on that port; the operator's `arguments` are put after it."""
        raise NotImplementedError

    def environment(self, wanted: Wanted) -> Mapping[str, str]:
        """Further variables of the server's environment."""
        return {}

    def folder(self, wanted: Wanted) -> Path | None:
        """The folder it works in; None for the one of this service."""
        return None

    def prepare(self, wanted: Wanted) -> None:
        """Make what the server needs before it starts. Raises OSError."""

    def gpu_ids(self, gpu_id: int, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The GPUs that a request asks for, the one it names first. Raises BadRequest."""
        return (gpu_id,)

    def is_ready(self, wanted: Wanted, probe: Probe) -> bool:
        """Whether the server says that it serves."""
        answer = probe.get(self.ready_path)
        return answer is not None and answer.status == HTTPStatus.OK

    def stated(self, wanted: Wanted) -> Mapping[str, Any]:
        """What the operator states of the model."""
        stated: Mapping[str, Any] = self.settings["supported_models"][wanted.model_name]
        return stated

    def instance_folder(self, wanted: Wanted) -> Path:
        """A folder of this instance alone; it lasts."""
        return self._place.folder / wanted.key

    def read_config(self, model_name: str, gpu_id: int, config: Mapping[str, Any]) -> Wanted:
        """The order for a supported model. Raises BadRequest, with the near names for an unknown key."""
        schema = self.config_schema()
        try:
            said: dict[str, Any] = schema.load(config)
        except ValidationError as error:
            messages = error.messages if isinstance(error.messages, Mapping) else {"_schema": error.messages}
            key, rules = next(iter(messages.items()))
            rule = rules[0] if isinstance(rules, list) else rules
            if rule == "Unknown field.":
                rule = f"{self.name} knows no such key.{near(str(key), schema.fields)}"
            raise BadRequest(f"config{'' if key == '_schema' else f'.{key}'}: {rule}") from error
        return Wanted(model_name, self.gpu_ids(gpu_id, said), said)

    def check(self, wanted: Wanted) -> None:
        """Look at folder, program and ports. Raises BadRequest or Conflict, naming the setting."""
        folder = self.folder(wanted)
        if folder is not None and not folder.is_dir():
            raise BadRequest(f"{self.name}.{self.folder_setting}: there is no folder {folder}.")
        program = self._command(wanted, 0)[0]
        if not self._found(program, folder, self._environ(wanted)):
            raise BadRequest(f"{self.name}.{self.program_setting}: {program} is not there, or is no program.")
        server = self._pid_file(wanted).read()
        if server is None or not server.lives():
            self._choose_port(wanted)

    def start(self, wanted: Wanted, abandoned: Callable[[], bool]) -> None:
        """Adopt its server or start one, and wait until it serves. Raises StartFailed, having ended it."""
        file = self._pid_file(wanted)
        server = file.read()
        if server is None or not server.lives():
            server = self._spawn(wanted, file, server)
        elif server.ready_at is not None:
            return
        until = time.monotonic() + self.settings["start_timeout_seconds"]
        while not abandoned():
            if not server.lives():
                raise self._failed(wanted, f"{_how(file, server)} before it served")
            if self._serves(wanted, server):
                file.note(server.token, ready_at=time.time())
                return
            if time.monotonic() >= until:
                seconds = self.settings["start_timeout_seconds"]
                raise self._failed(wanted, f"it did not serve on port {server.port} within {seconds:g} s")
            time.sleep(_LOOK_S)

    def stop(self, wanted: Wanted) -> None:
        """End its server with all its processes, and wait for its GPU memory. Raises Unavailable if one does not go."""
        file = self._pid_file(wanted)
        server = file.read()
        if server is not None:
            self._end(server)
            file.remove()

    def status(self, wanted: Wanted) -> Seen:
        """What its processes and its port tell now."""
        file = self._pid_file(wanted)
        try:
            server = file.read()
            if server is None or server.boot_id != proc.boot_id():
                return Seen(InstanceStatus.STOPPED)
            self._log(wanted).rotate()
            pids = frozenset(process.pid for process in server.processes())
            if server.lives():
                return self._living(wanted, server, pids)
            left = f"; still there: {len(pids)} of its processes" if pids else ""
            reason = f"{_how(file, server)}{left}."
            return Seen(InstanceStatus.ERROR, _sentence(reason), server.pid, server.port, pids)
        except OSError as error:
            logger.exception("the server of %s cannot be looked at", wanted.key)
            return Seen(InstanceStatus.ERROR, f"Its server cannot be looked at: {error}")

    def log(self, wanted: Wanted, tail: int) -> Sequence[str]:
        """The last lines that its server wrote, oldest first; those of earlier ones before them."""
        return self._log(wanted).tail(tail)

    def _living(self, wanted: Wanted, server: Server, pids: frozenset[int]) -> Seen:
        if self._serves(wanted, server):
            return Seen(InstanceStatus.RUNNING, None, server.pid, server.port, pids)
        if server.ready_at is None:
            return Seen(InstanceStatus.STARTING, None, server.pid, server.port, pids)
        # A server that is busy loading weights may not answer for a while, and runs.
        reason = f"It runs, but does not answer on port {server.port} just now."
        return Seen(InstanceStatus.RUNNING, reason, server.pid, server.port, pids)

    def _serves(self, wanted: Wanted, server: Server) -> bool:
        """Whether it answers as it should, and it is this server that does."""
        if not self.is_ready(wanted, Probe(self.settings["listen"], server.port, _PROBE_S)):
            return False
        # Whoever took the port between our choice and its start would answer as well.
        return server.ready_at is not None or proc.listens((p.pid for p in server.processes()), server.port)

    def _spawn(self, wanted: Wanted, file: PidFile, before: Server | None) -> Server:
        """Start its server, having ended what is left of the one before. Raises StartFailed."""
        try:
            if before is not None:
                self._end(before)
            self.prepare(wanted)
            # Until the pid file names the port, nobody else may choose one.
            with locks.held(self._place.folder / "ports.lock"):
                port = self._choose_port(wanted)
                return file.start(
                    model=wanted.model_name,
                    gpu_ids=wanted.gpu_ids,
                    port=port,
                    command=self._command(wanted, port),
                    environ=self._environ(wanted),
                    folder=self.folder(wanted),
                    log=self._log(wanted),
                )
        except (Conflict, Unavailable) as error:
            raise StartFailed(error.detail) from error
        except OSError as error:
            raise StartFailed(f"Its server could not be started: {error}") from error

    def _failed(self, wanted: Wanted, how: str) -> StartFailed:
        """The failure of a start, after the end of what there is of it."""
        lines = self._log(wanted).last(_LAST_LINES)
        last = next((line.strip() for line in reversed(lines) if line.strip()), None)
        reason = f"{how}. Its last line: {last}" if last else f"{how}, and wrote nothing."
        try:
            self.stop(wanted)
        except Unavailable as error:
            reason = f"{reason} {error.detail}"
        return StartFailed(_sentence(reason), lines)

    def _end(self, server: Server) -> None:
        pids = server.end(self.settings["stop_grace_seconds"])
        until = time.monotonic() + _MEMORY_S
        while any(self._place.memory_mib(gpu, pids) for gpu in server.gpu_ids):
            if time.monotonic() >= until:
                logger.warning("the GPU memory of %s is not back %.0f s after its end", server.model, _MEMORY_S)
                return
            time.sleep(_LOOK_S)

    def _choose_port(self, wanted: Wanted) -> int:
        """A port that nobody has. Raises Conflict."""
        listen = self.settings["listen"]
        taken = {server.port: server for server in self._living_servers(wanted)}
        fixed = self.stated(wanted)["port"]
        try:
            if fixed is not None:
                if (port := ports.first_free(listen, [fixed], taken)) is None:
                    who = f"by {taken[fixed].model}" if fixed in taken else "by another program"
                    raise Conflict(
                        f"{self.name}.supported_models.{wanted.model_name}.port: port {fixed} is taken {who}."
                    )
                return port
            first = self.settings["base_port"]
            after = min(first + self.settings["ports"], 65_536)
            if (port := ports.first_free(listen, range(first, after), taken)) is None:
                raise Conflict(
                    f"{self.name}.base_port: every port from {first} to {after - 1} is taken. "
                    f"Set another {self.name}.base_port, or more {self.name}.ports."
                )
            return port
        except OSError as error:
            raise Conflict(f"{self.name}.listen: {listen} cannot be listened on: {error.strerror}.") from error

    def _living_servers(self, wanted: Wanted) -> list[Server]:
        """The other servers of this runner."""
        files = [path for path in self._place.folder.glob("*.json") if path != self._pid_file(wanted).path]
        servers = [PidFile(path).read() for path in files]
        return [server for server in servers if server is not None and server.lives()]

    def _command(self, wanted: Wanted, port: int) -> list[str]:
        return [*self.command(wanted, port), *self.settings["arguments"], *self.stated(wanted)["arguments"]]

    def _environ(self, wanted: Wanted) -> dict[str, str]:
        passed = {
            name: value for name, value in os.environ.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)
        }
        return {
            **passed,
            # What a dying server wrote last must not lie in a buffer.
            "PYTHONUNBUFFERED": "1",
            **self.settings["environment"],
            **self.stated(wanted)["environment"],
            **self.environment(wanted),
            # As NVML counts them; CUDA's own order is by speed.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(wanted.gpu_ids))),
        }

    def _pid_file(self, wanted: Wanted) -> PidFile:
        return PidFile(self._place.folder / f"{wanted.key}.json")

    def _log(self, wanted: Wanted) -> ServerLog:
        max_bytes = int(self.settings["log_max_mib"] * 1024 * 1024)
        return ServerLog(self._place.folder / f"{wanted.key}.log", max_bytes, self.settings["log_files"])

    @staticmethod
    def _found(program: str, folder: Path | None, environ: Mapping[str, str]) -> bool:
        if os.sep in program:
            path = (folder or Path.cwd()) / program
            return path.is_file() and os.access(path, os.X_OK)
        return shutil.which(program, path=environ.get("PATH", os.defpath)) is not None


def _how(file: PidFile, server: Server) -> str:
    """How its main process ended, as far as anybody knows."""
    until = time.monotonic() + _PROBE_S
    while True:
        main = server.main()
        noted = file.read()
        code = noted.exit_code if noted is not None and noted.token == server.token else None
        if code is None and main is not None:
            code = main.exit_code
        # While it is a zombie its parent is about to note it, or never looks.
        if code is not None or main is None or time.monotonic() >= until:
            return how_it_ended(code)
        time.sleep(_LOOK_S / 10)


def _sentence(clause: str) -> str:
    return clause[:1].upper() + clause[1:]
