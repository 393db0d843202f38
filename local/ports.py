"""Whether the ports we want to listen on are free."""

import errno
import socket

from local.settings import LOOPBACK, Settings


class PortTaken(Exception):
    """Something listens on a port already; the message names the port and the variable that moves it."""


def check(settings: Settings) -> None:
    """Raises PortTaken for the first of the platform's ports that cannot be listened on."""
    numbers = [settings.port, settings.flower_port, settings.store_port, settings.gpu_admin_port]
    for number in numbers:
        if numbers.count(number) > 1:
            raise PortTaken(f"PORT, FLOWER_PORT, STORE_PORT and GPU_ADMIN_PORT must differ; {number} is given twice.")
    check_one("the API", settings.host, settings.port, "PORT")
    check_one("Flower", LOOPBACK, settings.flower_port, "FLOWER_PORT")
    check_one("the store", LOOPBACK, settings.store_port, "STORE_PORT")
    check_one("the host's admin API", settings.gpu_admin_host, settings.gpu_admin_port, "GPU_ADMIN_PORT")


def check_one(what: str, host: str, port: int, variable: str) -> None:
    """Raises PortTaken if nobody could listen there."""
    if reason := _refusal(host, port):
        raise PortTaken(
            f"Port {port} on {host}, wanted by {what}, {reason}. "
            f"Set {variable} to another port, for example {variable}={port + 1}."
        )


def _refusal(host: str, port: int) -> str | None:
    """Why nobody could listen there; None if one could."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a connection that has just ended does not count as in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on ({error})"
    return None
