"""The hosts resource, for admins: which GPU hosts there are, and the admin API of each, as docs/gpu_admin.md has it.

The routes of the host `local` are gpu_admin's own (app/hosts.py); those of the others pass on what they are told.
"""

import re
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from flask import Response, current_app, jsonify
from marshmallow import Schema, fields

from app import gpu_hosts
from app.audit import note_target
from app.auth import requires
from app.errors import HostAway, HostNotFound, HostRefusal, Invalid
from app.gpu_hosts import LOCAL, GpuHost
from app.keys import Scope
from app.parsing import Blueprint
from app.settings import Settings
from gpu_admin.contract import MODEL_NAME
from gpu_admin.schemas import (
    GPUInfo,
    KillProcessResponse,
    KillQuery,
    LogQuery,
    LogView,
    ModelInstanceInfo,
    ModelInstanceView,
    ModelStatusItem,
    StartRequest,
    StopRequest,
    SupportedModelView,
)

blueprint = Blueprint("hosts", __name__, url_prefix="/api/v1/hosts", description="GPU hosts and what runs on them.")

#: A host may wait for a model's memory to come back, or for a process to end.
STOP_S = 90.0
KILL_S = 30.0
#: A start is answered at once, but Docker may be slow.
START_S = 30.0

_AWAY = {
    502: "The host cannot be reached, does not take the platform's key, or failed.",
    504: "The host did not answer in time; what was asked may have been done.",
}
#: Statuses of gpu_admin that are passed on with its words; others are failures of the host.
_PASSED = frozenset({400, 403, 404, 409, 413, 501, 503})
_PID = {"name": "pid", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 1}}


class HostView(Schema):
    """A GPU host."""

    name = fields.String(metadata={"example": "gpu-7"})
    url = fields.String(allow_none=True, metadata={"description": "Of its gpu_admin; null for this host."})
    reachable = fields.Boolean()
    detail = fields.String(allow_none=True, metadata={"description": "Why it cannot be used now."})


class HostList(Schema):
    """All hosts of the settings."""

    items = fields.List(fields.Nested(HostView))


def _documented(view: Any) -> Any:
    """State what every route of a host may answer."""
    for status, words in _AWAY.items():
        view = blueprint.alt_response(status, description=words)(view)
    view = blueprint.alt_response(404, description="There is no such host, or nothing there of that name.")(view)
    return requires(Scope.ADMIN)(view)


@blueprint.get("")
@requires(Scope.ADMIN)
@blueprint.response(200, HostList)
def index() -> dict[str, Any]:
    """Every host, and whether it can be reached now."""
    settings: Settings = current_app.extensions["settings"]
    local = [{"name": LOCAL, "url": None, "reachable": True, "detail": None}] if settings.gpu_admin_mount else []
    troubles = gpu_hosts.look(settings.gpu_hosts.values())
    others = [
        {"name": host.name, "url": host.url, "reachable": troubles[host.name] is None, "detail": troubles[host.name]}
        for host in settings.gpu_hosts.values()
    ]
    return {"items": [*local, *others]}


@blueprint.get("/<host>/gpus")
@_documented
@blueprint.response(200, GPUInfo(many=True))
@blueprint.alt_response(501, description="No NVML there: the library or the driver is missing.")
def gpus(host: str) -> Response:
    """Every GPU of the host, its memory, and the processes that hold it."""
    return _pass(host, "GET", "gpus")


@blueprint.delete("/<host>/processes/<pid>", parameters=[_PID])
@_documented
@blueprint.arguments(KillQuery(), location="query")
@blueprint.response(200, KillProcessResponse)
@blueprint.alt_response(403, description="The process is none that may be ended.")
@blueprint.alt_response(409, description="Another process has that number now.")
def kill(query: dict[str, Any], host: str, pid: str) -> Response:
    """End a process that holds memory of a GPU of the host: SIGTERM, then SIGKILL."""
    if not re.fullmatch(r"[0-9]{1,10}", pid):
        raise Invalid({"pid": ["Must be the number of a process."]})
    return _pass(host, "DELETE", f"processes/{pid}", query=_sent(KillQuery(), query), deadline_s=KILL_S)


@blueprint.post("/<host>/models/start")
@_documented
@blueprint.arguments(StartRequest())
@blueprint.response(202, ModelInstanceInfo)
@blueprint.alt_response(400, description="The host refuses the order; `detail` says which rule it breaks.")
@blueprint.alt_response(409, description="It runs with another config, or its stated memory does not fit.")
@blueprint.alt_response(503, description="What it needs is away, such as Docker.")
def start(body: dict[str, Any], host: str) -> Response:
    """Start a model on a GPU of the host, in the background."""
    return _order(host, "models/start", body, START_S)


@blueprint.post("/<host>/models/stop")
@_documented
@blueprint.arguments(StopRequest())
@blueprint.response(200, ModelInstanceInfo)
@blueprint.alt_response(503, description="Its backend does not answer.")
def stop(body: dict[str, Any], host: str) -> Response:
    """Stop a model on a GPU of the host; answers once it is gone."""
    return _order(host, "models/stop", body, STOP_S)


@blueprint.get("/<host>/models/status")
@_documented
@blueprint.response(200, ModelStatusItem(many=True))
def status(host: str) -> Response:
    """Every model of the host that was started and not stopped, by GPU."""
    return _pass(host, "GET", "models/status")


@blueprint.get("/<host>/models/status/<model_name>")
@_documented
@blueprint.response(200, ModelStatusItem(many=True))
def status_of(host: str, model_name: str) -> Response:
    """One model of the host by GPU."""
    return _pass(host, "GET", f"models/status/{_model(model_name)}")


@blueprint.get("/<host>/models/supported")
@_documented
@blueprint.response(200, SupportedModelView(many=True))
def supported(host: str) -> Response:
    """Every model that can be started on the host."""
    return _pass(host, "GET", "models/supported")


@blueprint.get("/<host>/models/instances")
@_documented
@blueprint.response(200, ModelInstanceView(many=True))
def instances(host: str) -> Response:
    """Every model of the host that was started and not stopped, with all that is known of it."""
    return _pass(host, "GET", "models/instances")


@blueprint.get("/<host>/models/<model_name>/logs")
@_documented
@blueprint.arguments(LogQuery(), location="query")
@blueprint.response(200, LogView)
def logs(query: dict[str, Any], host: str, model_name: str) -> Response:
    """The last lines that a model's server wrote."""
    return _pass(host, "GET", f"models/{_model(model_name)}/logs", query=_sent(LogQuery(), query))


def _order(name: str, path: str, body: dict[str, Any], deadline_s: float) -> Response:
    _find(name)
    model = quote(str(body["model_name"]), safe="")
    note_target(f" {model} on GPU {body['gpu_id']}")
    return _pass(name, "POST", path, body=body, deadline_s=deadline_s)


def _pass(name: str, method: str, path: str, **told: Any) -> Response:
    """What the host answers. Raises HostNotFound, HostAway and HostRefusal."""
    try:
        answer = gpu_hosts.ask(_find(name), method, path, **told)
    except gpu_hosts.TimedOut as error:
        raise HostAway(HTTPStatus.GATEWAY_TIMEOUT, "host_timeout", str(error)) from error
    except gpu_hosts.Unreachable as error:
        raise HostAway(HTTPStatus.BAD_GATEWAY, "host_unreachable", str(error)) from error
    except gpu_hosts.HostFailure as error:
        raise HostAway(HTTPStatus.BAD_GATEWAY, "host_unusable", str(error)) from error
    if answer.status < HTTPStatus.BAD_REQUEST:
        response: Response = jsonify(answer.body)
        response.status_code = answer.status
        return response
    detail = answer.body.get("detail") if isinstance(answer.body, dict) else None
    words = f"Host {name}: {detail if isinstance(detail, str) else f'status {answer.status}.'}"
    if answer.status not in _PASSED:
        raise HostAway(HTTPStatus.BAD_GATEWAY, "host_failed", words)
    raise HostRefusal(HTTPStatus(answer.status), words)


def _find(name: str) -> GpuHost:
    settings: Settings = current_app.extensions["settings"]
    host = settings.gpu_hosts.get(name)
    if host is None:
        raise HostNotFound(name)
    return host


def _model(name: str) -> str:
    """A model's name as a path has it: none that leads elsewhere. Raises HostRefusal."""
    if not MODEL_NAME.match(name):
        raise HostRefusal(HTTPStatus.NOT_FOUND, f"There is no model {name[:64]!r}.")
    return quote(name, safe="")


def _sent(schema: Schema, query: dict[str, Any]) -> dict[str, Any]:
    """A query as it is written, without what was left out."""
    written: dict[str, Any] = schema.dump(query)
    return {name: value for name, value in written.items() if value is not None}
