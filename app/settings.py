"""Settings of the API, built from a mapping such as os.environ."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from tasks.routing import Region
from tasks.settings import SettingsError, data_dir, default_region, load_regions

HOST = "127.0.0.1"
PORT = 8000
#: A sync request holds a thread for as long as it waits; 1,100 idle ones take 62 MB (research/reliability.md 3).
THREADS = 1100
#: Threads that never wait for a job, so that health checks, submits and cancels are always answered.
SPARE_THREADS = 100
#: An hour of speech, as Base64 in JSON.
MAX_BODY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """What the API was told."""

    database_url: str
    #: Where params and results that are too large for a row lie: a folder, or a URL of fsspec's.
    blobs_url: str
    regions: Mapping[str, Region]
    #: Where a job goes whose client names no region.
    default_region: str
    host: str = HOST
    port: int = PORT
    threads: int = THREADS
    #: Serve other hosts although no key exists.
    allow_anonymous: bool = False
    #: Largest request body.
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def sync_waiters(self) -> int:
        """How many requests may wait for their job at once."""
        return max(self.threads - SPARE_THREADS, self.threads // 2)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings that an environment states. Raises SettingsError."""
        regions = load_regions(environ)
        return cls(
            database_url=_database(environ),
            blobs_url=environ.get("BLOBS_URL") or str(data_dir(environ) / "blobs"),
            regions=regions,
            default_region=default_region(environ, regions),
            host=environ.get("HOST") or HOST,
            port=_whole(environ, "PORT", PORT, least=1, most=65_535),
            threads=_whole(environ, "API_THREADS", THREADS, least=4, most=20_000),
            allow_anonymous=environ.get("GPU_ALLOW_ANONYMOUS", "").strip().lower() in ("1", "true", "yes", "on"),
            max_body_bytes=_whole(environ, "MAX_BODY_BYTES", MAX_BODY_BYTES, least=1024, most=1024**3),
        )


def _database(environ: Mapping[str, str]) -> str:
    url = environ.get("DATABASE_URL") or f"sqlite:///{data_dir(environ) / 'jobs.db'}"
    try:
        make_url(url)
    except ArgumentError:
        # Without the cause: its message would show the URL's password.
        raise SettingsError("DATABASE_URL must be like sqlite:///path or postgresql://user@host/name.") from None
    return url


def _whole(environ: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not least <= int(text) <= most:
        raise SettingsError(f"{name} must be a whole number from {least} to {most}, not {text!r}.")
    return int(text)
