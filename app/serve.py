"""`python -m app.serve`: the API under waitress."""

import errno
import logging
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import waitress
from dotenv import find_dotenv, load_dotenv
from flask import Flask
from sqlalchemy.exc import DBAPIError

from app.auth import is_loopback
from app.keys import Keys
from app.settings import Settings
from app.streams import Streams
from tasks import logs, memory, tracing
from tasks.settings import SettingsError

logger = logging.getLogger(__name__)

#: Exit code of a server that refuses to start as configured.
EXIT_REFUSED = 2
#: Open connections; slow clients hold one each without a thread (research/reliability.md 3).
CONNECTION_LIMIT = 2000
#: A connection that is silent for this long is closed.
CHANNEL_TIMEOUT_S = 20
#: Files that are open beside those of clients: databases, broker and store, blobs.
OTHER_FILES = 400
#: waitress refuses larger bodies itself, in plain text; up to there the app does, as a problem.
REFUSAL_ROOM_BYTES = 1024 * 1024


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    load_dotenv(find_dotenv(usecwd=True))
    try:
        logs.set_up(logging.INFO, os.environ)
    except SettingsError as error:
        _refuse(str(error))
    # It writes two lines whenever /ready asks whether the database is current.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        # Imported here: it reads .env and the environment, which may be wrong.
        from wsgi import app
    except SettingsError as error:
        _refuse(str(error))
    settings: Settings = app.extensions["settings"]
    try:
        memory.check(settings.regions.values())
    except SettingsError as error:
        _refuse(str(error))
    _check_keys(settings, app.extensions["keys"])
    _allow_files(settings)
    server = _open(app, settings)
    streams: Streams = app.extensions["streams"]

    def leave(_: int, __: FrameType | None) -> NoReturn:
        # Streams end at their next look, within the time that waitress leaves to running requests.
        streams.stopping.set()
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    mounted = app.extensions.get("gpu_admin")
    if mounted is not None:
        mounted.host.instances.watch()
    logger.info("the API is at http://%s:%d, its documentation at /docs", settings.host, settings.port)
    # Returns after SystemExit or KeyboardInterrupt, once short requests have ended or five seconds have passed.
    server.run()
    if mounted is not None:
        mounted.host.instances.close()
    app.extensions["dispatch"].close()
    tracing.stop()
    logger.info("the API has stopped")


def _check_keys(settings: Settings, keys: Keys) -> None:
    try:
        exist = keys.exist()
    except DBAPIError as error:
        _refuse(f"The database cannot be used ({error.orig}). If it is new: flask --app wsgi db upgrade")
    if exist:
        return
    if is_loopback(settings.host):
        logger.warning("no API key exists: programs on this host are served without one, nobody else is")
    elif settings.allow_anonymous:
        logger.warning("GPU_ALLOW_ANONYMOUS is set and no API key exists: everybody who reaches this port is served")
    else:
        _refuse(
            f"HOST={settings.host} can be reached from elsewhere, and no API key exists. Make one with "
            "`flask --app wsgi keys create NAME --scope infer`, or set HOST=127.0.0.1, or GPU_ALLOW_ANONYMOUS=1."
        )


def _allow_files(settings: Settings) -> None:
    """Let the process open a file for each connection, and one more for each waiter, as far as the system allows."""
    wanted = CONNECTION_LIMIT + settings.threads + OTHER_FILES
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= wanted:
        return
    raised = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
    if raised < wanted:
        logger.warning(
            "only %d files may be open, of %d for all clients: raise the hard limit (ulimit -Hn)", raised, wanted
        )


def _open(app: Flask, settings: Settings) -> Any:
    try:
        return waitress.create_server(
            app,
            host=settings.host,
            port=settings.port,
            threads=settings.threads,
            connection_limit=CONNECTION_LIMIT,
            channel_timeout=CHANNEL_TIMEOUT_S,
            # select(), its default, fails at the first file whose number is 1024: a few hundred waiting clients.
            asyncore_use_poll=True,
            max_request_body_size=settings.max_body_bytes + REFUSAL_ROOM_BYTES,
            ident=None,
            # Without reading ahead waitress does not notice that a client has hung up.
            channel_request_lookahead=1,
            # The Guard has to see that a request came through a proxy.
            clear_untrusted_proxy_headers=False,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            _refuse(f"Port {settings.port} is in use. Stop what uses it, or set PORT to another one.")
        _refuse(f"Cannot listen on HOST={settings.host}, PORT={settings.port}: {error.strerror or error}.")


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"The API does not start: {message}\n")
    sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
