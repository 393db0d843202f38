"""The admin API of this host inside the main one, under /api/v1/hosts/local: loaded only where the settings say so.

The same resources as on gpu_admin's own port, with the main API's keys (scope admin) and its errors.
"""

from flask import Flask, Response, g, request

from app import errors
from app.auth import requires
from app.docs import Api
from app.keys import Scope
from gpu_admin import open_host, routes
from gpu_admin.audit import Caller
from gpu_admin.contract import HostError
from gpu_admin.settings import Settings
from gpu_admin.settings import SettingsError as AdminSettingsError
from tasks.settings import SettingsError

PREFIX = "/api/v1/hosts/local"
#: Who is not let in, in the host's audit log.
NOBODY = "nobody"


def mount(app: Flask, api: Api) -> None:
    """Serve this host's resources, as the environment describes it; its keeper is started by app/serve.py.

    Raises SettingsError.
    """
    try:
        host = open_host(Settings.from_environ())
    except AdminSettingsError as error:
        raise SettingsError(f"GPU_ADMIN_MOUNT: {error}") from error
    app.register_error_handler(HostError, _answer)
    routes.add_to(app, api, host, _caller, prefix=PREFIX)
    for endpoint, view in app.view_functions.items():
        if endpoint.startswith(f"{routes.blueprint.name}."):
            requires(Scope.ADMIN)(view)


def _caller() -> Caller:
    known = g.get("caller")
    return Caller(known.key if known else NOBODY, request.remote_addr or "")


def _answer(error: HostError) -> Response:
    problem = errors.Problem(error.detail)
    problem.status = error.status
    problem.code = error.status.name.lower()
    return errors.answer(problem)
