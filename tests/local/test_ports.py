"""Ports that are in use, and what is said about them."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from local import ports
from local.settings import LOOPBACK, load
from tasks.settings import SettingsError
from tests.rig import free_port

VARIABLES = ["PORT", "FLOWER_PORT", "STORE_PORT", "GPU_ADMIN_PORT"]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


def environ(tmp_path: Path, **ports_taken: int) -> dict[str, str]:
    """Free ports, except for those given."""
    free = {name: str(free_port()) for name in VARIABLES}
    return {**free, **{name: str(port) for name, port in ports_taken.items()}, "GPU_DATA_DIR": str(tmp_path)}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_port_in_use_is_named_with_the_variable_that_moves_it(tmp_path: Path, taken: int, variable: str) -> None:
    settings = load(environ(tmp_path, **{variable: taken}))

    with pytest.raises(ports.PortTaken) as refusal:
        ports.check(settings)

    assert f"Port {taken} " in str(refusal.value)
    assert f"Set {variable} to another port" in str(refusal.value)


def test_free_ports_pass(tmp_path: Path) -> None:
    ports.check(load(environ(tmp_path)))


def test_a_port_that_was_just_left_is_free(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server((LOOPBACK, port)) as server:
        client = socket.create_connection((LOOPBACK, port))
        server.accept()[0].close()
        client.close()

    ports.check(load(environ(tmp_path, PORT=port)))


def test_one_port_for_two_parts_is_refused(tmp_path: Path) -> None:
    port = free_port()

    with pytest.raises(ports.PortTaken, match=f"must differ; {port}"):
        ports.check(load(environ(tmp_path, PORT=port, STORE_PORT=port)))


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused_by_name(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        load({**environ(tmp_path), variable: value})
