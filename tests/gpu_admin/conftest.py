"""What the tests of a host's admin API share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from gpu_admin import create_app
from tests.gpu_admin import seed_host
from tests.gpu_admin.nvml import Card, NvmlStub


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvmlStub:
    """The stub of NVML, loaded into this process: one GPU with nothing on it."""
    stub = NvmlStub(tmp_path)
    stub.preload()
    monkeypatch.setenv("NVML_STUB_STATE", str(stub.state))
    return stub


@pytest.fixture
def make_app(nvml: NvmlStub, tmp_path: Path) -> Iterator[Callable[..., Flask]]:
    """Makes the admin API of the seed's host, with two GPUs; changes of its settings by name."""
    nvml.write([Card(), Card()])
    apps: list[Flask] = []

    def make(**changes: Any) -> Flask:
        apps.append(create_app(seed_host.settings(tmp_path / "data", **changes)))
        return apps[-1]

    yield make
    for app in apps:
        app.extensions["gpu_admin"].host.instances.close()
    seed_host.end_servers(tmp_path / "data")


@pytest.fixture
def client(make_app: Callable[..., Flask]) -> FlaskClient:
    """A client of that API on its own host."""
    return make_app().test_client()
