"""TCP ports of this host that a server can be started on."""

import errno
import socket
from collections.abc import Container, Iterable

# Below 1024 the system may refuse a port to us: one that we cannot have is taken, too.
_TAKEN = (errno.EADDRINUSE, errno.EACCES)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    Raises OSError if the address is none of this host's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections that have ended lately do not keep a port, listeners do.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
    return True


def first_free(host: str, ports: Iterable[int], taken: Container[int] = ()) -> int | None:
    """The first port that a server could listen on; None if there is none."""
    return next((port for port in ports if port not in taken and is_free(host, port)), None)
