"""Settings of regions and workers, built from a mapping such as os.environ."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.catalogue import JobType
from tasks.routing import Region

ROOT = Path(__file__).resolve().parent.parent

#: The seed's four regions; coordinates of a large data centre city in each.
PLACES: Mapping[str, tuple[float, float, tuple[str, ...]]] = {
    "asia-east": (31.2, 121.5, ("CN", "HK", "MO", "TW", "JP", "KR", "MN")),
    "asia-south": (1.35, 103.8, ("SG", "MY", "ID", "TH", "VN", "PH", "IN", "BD", "LK", "AU", "NZ")),
    "europe-west": (50.1, 8.7, ("DE", "FR", "GB", "IE", "NL", "BE", "ES", "PT", "IT", "CH", "AT", "PL", "SE", "NO")),
    "america-north": (39.0, -77.5, ("US", "CA", "MX")),
}


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names it and the rule."""


def data_dir(environ: Mapping[str, str]) -> Path:
    """The folder for what this machine writes: database, store, logs."""
    return Path(environ.get("GPU_DATA_DIR") or ROOT / "var").resolve()


def default_store(environ: Mapping[str, str]) -> str:
    """The embedded Valkey that the Procfile starts."""
    return f"redis://127.0.0.1:{environ.get('STORE_PORT') or '6390'}"


def load_regions(environ: Mapping[str, str]) -> dict[str, Region]:
    """Every region by name.

    REGIONS is a JSON object of regions, each with any of broker, store, latitude, longitude, countries; what is left
    out comes from GPU_BROKER_URL, GPU_STORE_URL and the seed's table. Without it: the seed's four on one broker and
    store. The names are not BROKER_URL and STORE_URL, since Celery's command line takes BROKER_URL for its own option.
    """
    broker = environ.get("GPU_BROKER_URL") or f"{default_store(environ)}/0"
    store = environ.get("GPU_STORE_URL") or f"{default_store(environ)}/1"
    given: dict[str, dict[str, Any]] = {name: {} for name in PLACES}
    if environ.get("REGIONS"):
        try:
            given = json.loads(environ["REGIONS"])
        except ValueError as error:
            raise SettingsError(f"REGIONS must be a JSON object of regions by name: {error}") from error
        if not isinstance(given, dict) or not given or not all(isinstance(entry, dict) for entry in given.values()):
            raise SettingsError("REGIONS must be a JSON object of at least one region, each an object.")
    regions = {}
    for name, entry in given.items():
        latitude, longitude, countries = PLACES.get(name, (0.0, 0.0, ()))
        known = {"broker": broker, "store": store, "latitude": latitude, "longitude": longitude, "countries": countries}
        if unknown := set(entry) - set(known):
            raise SettingsError(f"REGIONS: {name} has unknown keys {sorted(unknown)}; known are {sorted(known)}.")
        regions[name] = Region(name=name, **{**known, **entry})
    return regions


def default_region(environ: Mapping[str, str], regions: Mapping[str, Region]) -> str:
    """GPU_REGION, else DEFAULT_REGION, else the first region. Raises SettingsError for one that is not configured."""
    name = environ.get("GPU_REGION") or environ.get("DEFAULT_REGION") or next(iter(regions))
    if name not in regions:
        raise SettingsError(f"Region {name!r} is not configured; there are {', '.join(regions)}.")
    return name


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

    #: Model id or folder per job type; missing means the catalogue's default for the device.
    models: Mapping[JobType, str]
    device_id: int | None
    dtype: str
    max_memory_gib: float | None
    offload: bool
    #: Cap on jobs at once; None means as many as the engines have slots.
    max_concurrent_jobs: int | None
    #: Seconds that running jobs may take to end after SIGTERM before they are given back.
    drain_grace_s: float
    #: What people call it; None means its region, host and device.
    name: str | None = None
    region: str | None = None
    country: str | None = None
    city: str | None = None
    #: The types it serves where the command line names no queues; empty means all it has a default model for.
    supported_types: tuple[JobType, ...] = ()
    #: Where it asks for broker and store, with which key.
    server_url: str | None = None
    api_key: str | None = None
    server_timeout_s: float = 30.0
    verify_ssl: bool = True
    #: Seconds between two showings of the card; the lease is renewed at least every 2 s whatever this is.
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


#: The seed's names of the model settings.
MODEL_VARIABLES: Mapping[str, JobType] = {
    "GPU_LLM_MODEL": JobType.LLM,
    "GPU_IMAGE_MODEL": JobType.IMAGE_GEN,
    "GPU_VISION_MODEL": JobType.VISION,
    "GPU_WHISPER_MODEL": JobType.WHISPER,
    "GPU_EMBEDDING_MODEL": JobType.EMBEDDING,
}


def load_worker(environ: Mapping[str, str] = os.environ) -> WorkerSettings:
    """The worker's settings from its environment. Raises SettingsError."""
    grace = _number(environ, "GPU_DRAIN_GRACE_SECONDS", 0)
    return WorkerSettings(
        models={job_type: environ[name] for name, job_type in MODEL_VARIABLES.items() if environ.get(name)},
        device_id=_integer(environ, "GPU_DEVICE_ID", 0),
        dtype=environ.get("GPU_DTYPE") or "auto",
        max_memory_gib=_number(environ, "GPU_MAX_MEMORY_GB", 0),
        offload=_truth(environ, "GPU_ENABLE_CPU_OFFLOAD", default=True),
        max_concurrent_jobs=_integer(environ, "GPU_MAX_CONCURRENT_JOBS", 1),
        drain_grace_s=30.0 if grace is None else grace,
    )


def _number(environ: Mapping[str, str], name: str, least: float) -> float | None:
    text = environ.get(name, "").strip()
    if not text or text == "null":
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise SettingsError(f"{name} must be a number, not {text!r}.") from error
    if not value >= least:
        raise SettingsError(f"{name} must be at least {least:g}, not {text}.")
    return value


def _integer(environ: Mapping[str, str], name: str, least: int) -> int | None:
    value = _number(environ, name, least)
    if value is not None and value != int(value):
        raise SettingsError(f"{name} must be a whole number, not {environ[name]}.")
    return None if value is None else int(value)


def _truth(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = environ.get(name, "").strip().lower()
    if not text:
        return default
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise SettingsError(f"{name} must be true or false, not {text!r}.")
