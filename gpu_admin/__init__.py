"""One host's GPUs, processes and model servers.

Imports nothing by itself: whoever wants one module of this package loads no more than that.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from gpu_admin.host import Host
    from gpu_admin.settings import Settings


def create_app(settings: "Settings | None" = None) -> "Flask":
    """The admin API, its keeper thread running: `gunicorn 'gpu_admin:create_app()'`.

    Without settings, those of .env and the environment. Raises SettingsError.
    """
    import gpu_admin.web

    return gpu_admin.web.create_app(settings)


def open_host(settings: "Settings") -> "Host":
    """What the API shows and moves, without a thread of its own. Raises SettingsError."""
    import gpu_admin.host

    return gpu_admin.host.open_host(settings)
