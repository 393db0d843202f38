"""What a worker can be told: one row for each key of config.yaml, with its variable, its rule and its meaning.

Loading, checking, printing and the documentation follow from the rows; a default stands in WorkerSettings alone.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, assert_never
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from zoneinfo import ZoneInfo, available_timezones

from engines.catalogue import PINNED, JobType, find
from engines.contract import DTYPES

#: Exit code of a worker that cannot start as configured: EX_CONFIG of sysexits.h. A supervisor need not retry it.
EXIT_CONFIG = 78
#: Exit code of a worker that could not reach what it needs: started again later, it may.
EXIT_AWAY = 1

MASK = "***"


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names it and the rule."""


@dataclass(frozen=True, slots=True)
class DirectSettings:
    """Direct mode: the worker's own HTTP server."""

    enabled: bool = False
    host: str = "0.0.0.0"  # noqa: S104 - the seed's default; it serves holders of a token only
    port: int = 8080
    #: Where clients reach it; None means http:// and this host's address and port.
    public_url: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one worker process was told."""

    #: Model id, folder or server's URL per job type; missing means the catalogue's default for the device.
    models: Mapping[JobType, str] = field(default_factory=dict)
    device_id: int | None = None
    dtype: str = "auto"
    max_memory_gib: float | None = None
    offload: bool = True
    #: Cap on jobs at once; None means as many as the engines have slots.
    max_concurrent_jobs: int | None = None
    #: Seconds that running jobs may take to end after SIGTERM before they are given back.
    drain_grace_s: float = 30.0
    #: What people call it; None means its region, host and device.
    name: str | None = None
    region: str | None = None
    country: str | None = None
    city: str | None = None
    #: The types it serves where the command line names no queues; empty means those that a model is named for, else
    #: llm. See served_types.
    supported_types: tuple[JobType, ...] = ()
    #: Where it asks for broker and store, with which key.
    server_url: str | None = None
    api_key: str | None = None
    server_timeout_s: float = 30.0
    verify_ssl: bool = True
    #: Its region's broker and store; None means the server's answer, else the embedded Valkey of this machine.
    broker_url: str | None = None
    store_url: str | None = None
    #: Speak to them and to server_url without TLS although they are not on this machine.
    allow_plaintext: bool = False
    #: Code of their own that models may run, as id@commit.
    trust_remote_code: tuple[str, ...] = ()
    #: Seconds between two beats, at most: its lease needs one every 2 s.
    heartbeat_interval_s: float = 30.0
    poll_interval_s: float = 2.0
    direct: DirectSettings = DirectSettings()
    #: Share of its capacity that it gives, 0 to 1.
    acceptance_rate: float = 1.0
    #: Whole hours of its own zone, 0 to 23; both or neither.
    working_hours_start: int | None = None
    working_hours_end: int | None = None
    #: IANA name of its zone; None means the host's.
    timezone: str | None = None

    @property
    def served_types(self) -> tuple[JobType, ...]:
        """The types it serves where the command line names no queues."""
        return self.supported_types or tuple(self.models) or (JobType.LLM,)


class Kind(StrEnum):
    """What an option's text must be."""

    #: One line.
    TEXT = "text"
    WHOLE = "whole number"
    NUMBER = "number"
    TRUTH = "true or false"
    #: http:// or https:// with a host.
    WEB = "http URL"
    #: Any scheme: what the broker's or the store's library takes.
    URL = "URL"
    #: IANA name.
    ZONE = "time zone"
    #: Names of job types; in a variable with commas between.
    TYPES = "job types"
    #: Models at a commit, such as org/model@<40 hex digits>, with commas between.
    PINNED = "models at a commit"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a worker can be told."""

    #: Where config.yaml has it, with dots.
    path: str
    variable: str
    #: Where WorkerSettings has it, with a dot for what lies in another object or mapping there.
    target: str
    kind: Kind
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    #: Never shown.
    secret: bool = False

    @property
    def default(self) -> Any:
        """What holds when nobody says otherwise."""
        value: Any = _DEFAULTS
        for name in self.target.split("."):
            value = value.get(JobType(name)) if isinstance(value, Mapping) else getattr(value, name)
        return value

    @property
    def rule(self) -> str:
        """What its value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        article = "" if self.kind in (Kind.TRUTH, Kind.TYPES, Kind.PINNED) else "an " if self.kind is Kind.WEB else "a "
        if self.kind is Kind.TEXT:
            return "one line of text"
        if self.least is None:
            return f"{article}{self.kind}"
        bounds = f"of at least {self.least:g}" if self.most is None else f"from {self.least:g} to {self.most:g}"
        return f"{article}{self.kind} {bounds}"

    def read(self, text: str, where: str) -> Any:
        """The value that a text states. where: how to name it. Raises SettingsError."""
        match self.kind:
            case Kind.TEXT:
                return self._line(text, where)
            case Kind.WHOLE | Kind.NUMBER:
                return self._number(text, where)
            case Kind.TRUTH:
                return self._truth(text, where)
            case Kind.WEB | Kind.URL:
                return self._url(text, where)
            case Kind.ZONE:
                return self._zone(text, where)
            case Kind.TYPES:
                return self._types(text, where)
            case Kind.PINNED:
                return self._pinned(text, where)
            case Kind.CHOICE:
                if text not in self.choices:
                    raise SettingsError(f"{where} must be {self.rule}, not {text!r}.{near(text, self.choices)}")
                return text
            case _:
                assert_never(self.kind)

    def show(self, text: str) -> str:
        """The text without its secrets."""
        if self.secret:
            return MASK
        return mask_url(text) if "://" in text else text

    def _line(self, text: str, where: str) -> str:
        if not text.isprintable() or len(text) > 1024:
            raise SettingsError(f"{where} must be one line of at most 1024 printable characters.")
        return text

    def _number(self, text: str, where: str) -> int | float:
        try:
            value = float(text)
        except ValueError as error:
            raise SettingsError(f"{where} must be {self.rule}, not {text!r}.") from error
        if self.least is not None and not value >= self.least:
            raise SettingsError(f"{where} must be at least {self.least:g}, not {text}.")
        if not math.isfinite(value) or (self.most is not None and value > self.most):
            raise SettingsError(f"{where} must be at most {self.most or math.inf:g}, not {text}.")
        if self.kind is Kind.NUMBER:
            return value
        if value != int(value):
            raise SettingsError(f"{where} must be a whole number, not {text}.")
        return int(value)

    def _truth(self, text: str, where: str) -> bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise SettingsError(f"{where} must be true or false, not {text!r}.")

    def _url(self, text: str, where: str) -> str:
        example = "http://gpu.example.com:8000" if self.kind is Kind.WEB else "redis://:password@10.0.0.5:6379/0"
        try:
            parts = urlsplit(text)
            valid = bool(parts.scheme and "://" in text and (parts.hostname or self.kind is Kind.URL))
            _ = parts.port
        except ValueError:
            valid = False
        if not valid or (self.kind is Kind.WEB and parts.scheme not in ("http", "https")):
            # Not the text itself: it may hold a password.
            raise SettingsError(f"{where} must be a URL such as {example}.")
        return text.rstrip("/") if self.kind is Kind.WEB else text

    def _zone(self, text: str, where: str) -> str:
        known = available_timezones()
        if text not in known:
            missing = "" if known else " This host has no list of zones: install the package tzdata."
            raise SettingsError(
                f"{where} must be the IANA name of a time zone, such as Asia/Shanghai, not {text!r}."
                f"{missing or near(text, known)}"
            )
        return ZoneInfo(text).key

    def _pinned(self, text: str, where: str) -> tuple[str, ...]:
        found = tuple(filter(None, map(str.strip, text.split(","))))
        for name in found:
            if not PINNED.fullmatch(name):
                raise SettingsError(
                    f"{where}: {name!r} must be org/model@commit, with all 40 hex digits of a commit you have read."
                )
        return found

    def _types(self, text: str, where: str) -> tuple[JobType, ...]:
        found = []
        for name in filter(None, map(str.strip, text.split(","))):
            if name not in list(JobType):
                raise SettingsError(
                    f"{where}: {name!r} is no job type; there are {', '.join(JobType)}.{near(name, JobType)}"
                )
            found.append(JobType(name))
        return tuple(dict.fromkeys(found))


_DEFAULTS = WorkerSettings()

OPTIONS: tuple[Option, ...] = (
    Option("name", "GPU_NAME", "name", Kind.TEXT, "What people call this worker; default: region, host and device."),
    Option(
        "region", "GPU_REGION", "region", Kind.TEXT, "The region it serves; default: the platform's default region."
    ),
    Option("country", "GPU_COUNTRY", "country", Kind.TEXT, "Where it stands; shown in the list of workers."),
    Option("city", "GPU_CITY", "city", Kind.TEXT, "Where it stands; shown in the list of workers."),
    Option(
        "server.url",
        "GPU_SERVER_URL",
        "server_url",
        Kind.WEB,
        "The platform's API, asked for broker and store at start.",
    ),
    Option("server.api_key", "GPU_API_KEY", "api_key", Kind.TEXT, "A key of scope worker for server.url.", secret=True),
    Option(
        "server.timeout",
        "GPU_SERVER_TIMEOUT",
        "server_timeout_s",
        Kind.NUMBER,
        "Seconds that one request to server.url may take.",
        least=0.1,
        most=600,
    ),
    Option(
        "server.verify_ssl",
        "GPU_SERVER_VERIFY_SSL",
        "verify_ssl",
        Kind.TRUTH,
        "Check the certificate of server.url; false only with one that you signed yourself.",
    ),
    Option(
        "server.broker_url",
        "GPU_BROKER_URL",
        "broker_url",
        Kind.URL,
        "The region's broker: Redis, Valkey or RabbitMQ; default: what server.url says, else redis://127.0.0.1:6390/0.",
    ),
    Option(
        "server.store_url",
        "GPU_STORE_URL",
        "store_url",
        Kind.URL,
        "The region's store: Redis or Valkey; default: what server.url says, else redis://127.0.0.1:6390/1.",
    ),
    Option(
        "server.allow_plaintext",
        "GPU_ALLOW_PLAINTEXT",
        "allow_plaintext",
        Kind.TRUTH,
        "Speak to API, broker and store elsewhere without TLS: only where the network between is trusted.",
    ),
    Option(
        "trust_remote_code",
        "GPU_TRUST_REMOTE_CODE",
        "trust_remote_code",
        Kind.PINNED,
        "Models whose repository's own code may run here, each at the commit that you have read; default: none.",
    ),
    Option(
        "gpu.enable_cpu_offload",
        "GPU_ENABLE_CPU_OFFLOAD",
        "offload",
        Kind.TRUTH,
        "Move weights to host memory when they do not fit on the GPU.",
    ),
    Option(
        "gpu.max_memory_gb",
        "GPU_MAX_MEMORY_GB",
        "max_memory_gib",
        Kind.NUMBER,
        "Cap on the GPU's memory, in GiB; default: what is free.",
        least=0,
    ),
    Option(
        "gpu.device_id",
        "GPU_DEVICE_ID",
        "device_id",
        Kind.WHOLE,
        "Which GPU, as nvidia-smi numbers them; default: the first one.",
        least=0,
        most=1023,
    ),
    Option(
        "gpu.dtype",
        "GPU_DTYPE",
        "dtype",
        Kind.CHOICE,
        "What to compute in; auto takes the fastest that the GPU has arithmetic for.",
        choices=("auto", *DTYPES),
    ),
    Option(
        "supported_types",
        "GPU_SUPPORTED_TYPES",
        "supported_types",
        Kind.TYPES,
        "The job types it serves when started without -Q; default: those that a model is named for, else llm.",
    ),
    *(
        Option(
            f"engines.{job_type}.model_id",
            variable,
            f"models.{job_type}",
            Kind.TEXT,
            f"The model for {job_type}: an id or alias of the catalogue, or a folder; default: the catalogue's.",
        )
        for variable, job_type in (
            ("GPU_LLM_MODEL", JobType.LLM),
            ("GPU_IMAGE_MODEL", JobType.IMAGE_GEN),
            ("GPU_VISION_MODEL", JobType.VISION),
            ("GPU_WHISPER_MODEL", JobType.WHISPER),
            ("GPU_EMBEDDING_MODEL", JobType.EMBEDDING),
        )
    ),
    *(
        Option(
            f"engines.{job_type}.url",
            variable,
            f"models.{job_type}",
            Kind.TEXT,
            f"The {server} of this host that runs {job_type} jobs: its URL; default: {find(job_type, job_type).url}.",
        )
        for variable, job_type, server in (
            ("GPU_COMFYUI_URL", JobType.COMFYUI, "ComfyUI"),
            ("GPU_TRITON_URL", JobType.TRITON, "Triton server"),
        )
    ),
    Option(
        "heartbeat_interval",
        "GPU_HEARTBEAT_INTERVAL",
        "heartbeat_interval_s",
        Kind.NUMBER,
        "Seconds between two beats; more than 2 counts as 2, since a worker that is silent for 10 s is taken for lost.",
        least=1,
        most=3600,
    ),
    Option(
        "poll_interval",
        "GPU_POLL_INTERVAL",
        "poll_interval_s",
        Kind.NUMBER,
        "Seconds between two looks at whether it may take jobs again, for example at the start of its hours.",
        least=0.1,
        most=60,
    ),
    Option(
        "direct.enabled",
        "GPU_DIRECT_ENABLED",
        "direct.enabled",
        Kind.TRUTH,
        "Serve jobs on a port of its own, to holders of a token.",
    ),
    Option("direct.host", "GPU_DIRECT_HOST", "direct.host", Kind.TEXT, "The address that port listens on."),
    Option(
        "direct.port",
        "GPU_DIRECT_PORT",
        "direct.port",
        Kind.WHOLE,
        "That port; each worker of a host needs its own.",
        least=1,
        most=65_535,
    ),
    Option(
        "direct.public_url",
        "GPU_DIRECT_PUBLIC_URL",
        "direct.public_url",
        Kind.WEB,
        "Where clients reach it; default: http:// with this host's address and that port.",
    ),
    Option(
        "load_control.acceptance_rate",
        "GPU_ACCEPTANCE_RATE",
        "acceptance_rate",
        Kind.NUMBER,
        "The share of its capacity that it gives; 0 takes no jobs.",
        least=0,
        most=1,
    ),
    Option(
        "load_control.max_concurrent_jobs",
        "GPU_MAX_CONCURRENT_JOBS",
        "max_concurrent_jobs",
        Kind.WHOLE,
        "Cap on jobs at once; default: as many as the engines run well together.",
        least=1,
        most=100_000,
    ),
    Option(
        "load_control.working_hours_start",
        "GPU_WORKING_HOURS_START",
        "working_hours_start",
        Kind.WHOLE,
        "The hour from which it takes jobs; with working_hours_end or not at all.",
        least=0,
        most=23,
    ),
    Option(
        "load_control.working_hours_end",
        "GPU_WORKING_HOURS_END",
        "working_hours_end",
        Kind.WHOLE,
        "The hour at which it stops taking jobs; one before the start means the next morning.",
        least=0,
        most=23,
    ),
    Option(
        "load_control.timezone",
        "GPU_TIMEZONE",
        "timezone",
        Kind.ZONE,
        "The zone of those hours, such as Asia/Shanghai; default: the host's.",
    ),
    Option(
        "load_control.drain_grace_seconds",
        "GPU_DRAIN_GRACE_SECONDS",
        "drain_grace_s",
        Kind.NUMBER,
        "Seconds that running jobs may take to end after SIGTERM before they are given back.",
        least=0,
        most=86_400,
    ),
)

BY_PATH: Mapping[str, Option] = {option.path: option for option in OPTIONS}
BY_VARIABLE: Mapping[str, Option] = {option.variable: option for option in OPTIONS}

#: What names the model of each type, or its server; the seed's names where it has one.
MODEL_VARIABLES: Mapping[str, JobType] = {
    option.variable: JobType(option.target.removeprefix("models."))
    for option in OPTIONS
    if option.target.startswith("models.")
}


def near(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names that look like `name`, after a space; nothing where none does."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def mask_url(url: str) -> str:
    """A URL without the passwords in it."""
    try:
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        if ":" in user:
            user = f"{user.partition(':')[0]}:{MASK}"
        said = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return MASK
    hidden = [(name, MASK if re.search("pass|secret|token|key", name, re.I) else value) for name, value in said]
    query = urlencode(hidden, safe=f"{MASK}/:") if hidden != said else parts.query
    return urlunsplit((parts.scheme, f"{user}{at}{host}", parts.path, query, parts.fragment))
