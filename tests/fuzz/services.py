"""Both services in this process, on real parts: what the cases of a run are sent to."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flask import Flask

import app
import gpu_admin
from app.keys import Keys, Scope
from app.settings import Settings
from gpu_admin import keys as admin_keys
from tasks.settings import load_regions
from tests.fuzz.worker import REGION, EchoWorker
from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import Card, NvmlStub

#: The names of the services.
NAMES = ("api", "gpu_admin")


@dataclass(frozen=True)
class Service:
    """A WSGI application, and what a caller who may do everything sends with each request."""

    name: str
    app: Flask
    headers: Mapping[str, str]


@contextmanager
def open_service(name: str, folder: Path, valkey_url: str, database: Path, *, seed: int) -> Iterator[Service]:
    """The service of that name, with a key; it ends with the context.

    folder: an empty one. valkey_url: an empty server, without a database's number. database: a migrated SQLite file,
    which is copied. seed: chooses the jobs that fail.
    """
    nvml = NvmlStub(folder)
    nvml.preload()
    nvml.write([Card(), Card()])
    before = dict(os.environ)
    os.environ["NVML_STUB_STATE"] = str(nvml.state)
    try:
        if name == "api":
            os.environ.update(seed_host.environ(folder, 6004))
            with _api(folder, valkey_url, database, seed) as service:
                yield service
        else:
            with _gpu_admin(folder / "data") as service:
                yield service
    finally:
        seed_host.end_servers(folder / "data")
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _api(folder: Path, valkey_url: str, database: Path, seed: int) -> Iterator[Service]:
    """The main API with the admin API of this host in it, and a worker."""
    shutil.copy(database, folder / "jobs.db")
    regions = load_regions({"GPU_STORE_URL": f"{valkey_url}/1", "GPU_BROKER_URL": f"{valkey_url}/0"})
    settings = Settings(
        *(f"sqlite:///{folder / 'jobs.db'}", str(folder / "blobs"), regions, REGION),
        threads=8,
        gpu_admin_mount=True,
        # A run sends more in a second than any client may.
        rate_submit=0,
        rate_sync=0,
        rate_read=0,
        rate_cancel=0,
        max_queued_per_key=0,
    )
    flask = app.create_app(settings)
    keys: Keys = flask.extensions["keys"]
    worker = EchoWorker(f"{valkey_url}/1", seed)
    try:
        yield Service("api", flask, {"X-API-Key": keys.create("fuzz", list(Scope))})
    finally:
        worker.close()
        flask.extensions["gpu_admin"].host.instances.close()
        flask.extensions["dispatch"].close()
        flask.extensions["database"].dispose()


@contextmanager
def _gpu_admin(data: Path) -> Iterator[Service]:
    """The admin API of the seed's host on its own."""
    flask = gpu_admin.create_app(seed_host.settings(data))
    key = admin_keys.Keys(data).create("fuzz", admin_keys.Scope.ADMIN)
    try:
        yield Service("gpu_admin", flask, {"X-API-Key": key})
    finally:
        flask.extensions["gpu_admin"].host.instances.close()
