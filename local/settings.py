"""Where the local platform listens and what it writes, built from a mapping such as os.environ."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.settings import Settings as ApiSettings
from engines.catalogue import DEFAULT_ON_CPU
from gpu_admin.settings import Settings as AdminSettings
from gpu_admin.settings import SettingsError as AdminSettingsError
from tasks.settings import MODEL_VARIABLES, SettingsError, data_dir, default_store, effective

LOOPBACK = "127.0.0.1"
FLOWER_PORT = "5555"


@dataclass(frozen=True, slots=True)
class Settings:
    """One local platform: its ports, and the folder that holds everything it writes."""

    #: The address the API listens on; store and Flower are on loopback whatever it is.
    host: str
    port: int
    flower_port: int
    #: The address and port of this host's admin API.
    gpu_admin_host: str
    gpu_admin_port: int
    store_port: int
    database_url: str
    #: Database, store, logs and pid files.
    data_dir: Path

    @property
    def run_dir(self) -> Path:
        """Pid files and the lock of the platform that runs."""
        return self.data_dir / "run"

    @property
    def log_dir(self) -> Path:
        """What the processes said."""
        return self.data_dir / "log"

    @property
    def store_dir(self) -> Path:
        """The embedded Valkey's files."""
        return self.data_dir / "store"

    @property
    def api_url(self) -> str:
        """Where this machine reaches the API."""
        return _url(self.host, self.port)

    @property
    def gpu_admin_url(self) -> str:
        """Where this machine reaches its admin API."""
        return _url(self.gpu_admin_host, self.gpu_admin_port)

    @property
    def flower_url(self) -> str:
        """Where this machine reaches Flower."""
        return f"http://{LOOPBACK}:{self.flower_port}"


def load(environ: Mapping[str, str]) -> Settings:
    """The settings; a variable that is empty counts as left out. Raises SettingsError."""
    store = default_store(environ)
    api = ApiSettings.from_environ(environ)
    try:
        admin = AdminSettings.from_environ(environ)
    except AdminSettingsError as error:
        raise SettingsError(str(error)) from error
    return Settings(
        host=api.host,
        port=api.port,
        database_url=api.database_url,
        flower_port=_port("FLOWER_PORT", environ.get("FLOWER_PORT") or FLOWER_PORT),
        gpu_admin_host=admin.host,
        gpu_admin_port=admin.port,
        store_port=_port("STORE_PORT", store.rpartition(":")[2]),
        data_dir=data_dir(environ),
    )


def for_processes(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """What the platform's processes find in their environment: every setting spelled out, all else as it was.

    Raises SettingsError for a config.yaml that cannot be used.
    """
    told = effective(environ)
    store = f"redis://{LOOPBACK}:{settings.store_port}"
    direct = [environ.get("no_proxy") or environ.get("NO_PROXY"), LOOPBACK, "localhost", "::1"]
    loopback = ",".join(filter(None, direct))
    return {
        # Overridden by what the operator has set.
        "CELERY_WORKER_LOGLEVEL": "INFO",
        **environ,
        # The small ones, on a GPU too: its own defaults are a hundred gigabytes of downloads.
        **{name: told.get(name) or DEFAULT_ON_CPU[job_type] for name, job_type in MODEL_VARIABLES.items()},
        # Over config.yaml, which may be written for a worker of another platform.
        "GPU_BROKER_URL": environ.get("GPU_BROKER_URL") or f"{store}/0",
        "GPU_STORE_URL": environ.get("GPU_STORE_URL") or f"{store}/1",
        "HOST": settings.host,
        "PORT": str(settings.port),
        "FLOWER_PORT": str(settings.flower_port),
        "GPU_ADMIN_HOST": settings.gpu_admin_host,
        "GPU_ADMIN_PORT": str(settings.gpu_admin_port),
        "STORE_PORT": str(settings.store_port),
        "DATABASE_URL": settings.database_url,
        "GPU_DATA_DIR": str(settings.data_dir),
        # The Procfile says `python` and `celery`: those of the virtual environment that runs this.
        "PATH": f"{Path(sys.executable).parent}:{environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        # A proxy cannot reach this machine's loopback.
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


def _url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens there."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = LOOPBACK
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _port(name: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SettingsError(f"{name} must be a port number from 1 to 65535, not {text!r}.")
    return int(text)
