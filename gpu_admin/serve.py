"""What gunicorn is told when it serves this package; see gunicorn.conf.py."""

import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from gpu_admin import logs
from gpu_admin.auth import is_loopback
from gpu_admin.environment import read_settings
from gpu_admin.host import open_host
from gpu_admin.keys import Keys, KeysUnreadable
from gpu_admin.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

#: Exit code of a server that refuses to start as configured.
EXIT_REFUSED = 2


def address() -> str:
    """Where the settings say to listen. Ends the process, with a line, if they are wrong."""
    logs.set_up(os.environ)
    try:
        settings = read_settings()
    except SettingsError as error:
        refuse(str(error))
    return f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"


def on_starting(server: Any) -> None:
    """gunicorn's hook before it listens: everything that would keep its workers from serving is said here, once."""
    try:
        settings = read_settings()
        open_host(settings)
        _check_keys(settings, server.cfg.address)
    except (SettingsError, KeysUnreadable) as error:
        refuse(str(error))


def worker_exit(_: Any, worker: Any) -> None:
    """gunicorn's hook after a worker: starts that it was at are left to the next one; model servers go on."""
    app = worker.app.callable
    # None in a worker that could not load it.
    if app is not None:
        app.extensions["gpu_admin"].host.instances.close()


def refuse(message: str) -> NoReturn:
    """End the process, saying why."""
    sys.stderr.write(f"The admin API does not start: {message}\n")
    sys.exit(EXIT_REFUSED)


def _check_keys(settings: Settings, addresses: Iterable[Any]) -> None:
    """Refuse what other hosts could reach while no key exists. Raises KeysUnreadable.

    addresses: what gunicorn will listen on, wherever that was said; a text is a unix socket.
    """
    if Keys(settings.data_dir).exist():
        return
    hosts = ["a unix socket" if isinstance(address, str) else str(address[0]) for address in addresses]
    outside = [host for host in hosts if not is_loopback(host)]
    if not outside:
        logger.warning("no API key exists: programs on this host are served without one, nobody else is")
    elif settings.allow_anonymous:
        logger.warning("allow_anonymous is set and no API key exists: everybody who reaches this port may look")
    else:
        refuse(
            f"{outside[0]} can be reached from elsewhere, and no API key exists. Make one with "
            "`python -m gpu_admin.keys create NAME --scope admin`, or set GPU_ADMIN_HOST=127.0.0.1."
        )
