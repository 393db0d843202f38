"""The host's resources: GPUs, processes, models. Registered by add_to(), here and in the platform's main API."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, current_app, g, request

from gpu_admin.audit import Caller
from gpu_admin.auth import needs
from gpu_admin.contract import BadRequest, HostError, InstanceStatus, NotFound
from gpu_admin.gpus import Gpu
from gpu_admin.host import Host
from gpu_admin.instances import Instance
from gpu_admin.keys import Scope
from gpu_admin.parsing import Blueprint
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

blueprint = Blueprint("host", __name__, description="This host's GPUs, processes and model servers.")

_PID = {"name": "pid", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 1}}


@dataclass(frozen=True, slots=True)
class Edge:
    """The app's extension `gpu_admin`."""

    host: Host
    #: Whoever sends the request at hand.
    caller: Callable[[], Caller]


def add_to(app: Flask, api: Any, host: Host, caller: Callable[[], Caller], *, prefix: str) -> None:
    """Serve the host under a prefix of an app.

    api: the app's flask-smorest Api. caller: whoever sends the request at hand, also one that is refused. Who may call
    what is for the app to say, before its views; its error handlers answer HostError.
    """
    app.extensions["gpu_admin"] = Edge(host, caller)
    api.register_blueprint(blueprint, url_prefix=prefix)


@blueprint.before_request
def _admitted() -> None:
    # Runs after the app's own check of who asks.
    g.admitted = True


@blueprint.after_request
def _audit_refusal(response: Response) -> Response:
    """Note who tried to change something and was not let in; what is refused later is noted where it is refused."""
    if response.status_code in (401, 403) and request.method not in ("GET", "HEAD") and not g.get("admitted"):
        edge = _edge()
        edge.host.audit.record("request.refused", edge.caller(), method=request.method, path=request.path[:200])
    return response


@blueprint.get("/gpus")
@needs(Scope.READ)
@blueprint.response(200, GPUInfo(many=True))
@blueprint.alt_response(501, description="No NVML: the library or the driver is missing.")
def gpus() -> list[dict[str, Any]]:
    """Every GPU, its memory, and the processes that hold it."""
    return [_gpu_info(gpu) for gpu in _edge().host.gpus.read()]


# A text to Flask, so that what is no number is answered as bad input rather than as an unknown path.
@blueprint.delete("/processes/<pid>", parameters=[_PID])
@needs(Scope.ADMIN)
@blueprint.arguments(KillQuery(), location="query")
@blueprint.response(200, KillProcessResponse)
@blueprint.alt_response(403, description="The process is none that may be ended here, or another user's.")
@blueprint.alt_response(404, description="There is no such process.")
def kill(query: dict[str, Any], pid: str) -> dict[str, Any]:
    """End a process that holds memory of a GPU, or that this service started: SIGTERM, then SIGKILL.

    With `started_at`, as `GET /gpus` shows it, a process that has got the same number since is left alone.
    """
    number = _pid(pid)
    edge = _edge()
    edge.host.processes.kill(number, edge.caller(), started_at=query["started_at"])
    return {"pid": number, "status": "killed"}


@blueprint.post("/models/start")
@needs(Scope.ADMIN)
@blueprint.arguments(StartRequest())
@blueprint.response(202, ModelInstanceInfo)
@blueprint.alt_response(409, description="It runs with another config, or its stated memory does not fit.")
@blueprint.alt_response(503, description="What it needs is away, such as Docker.")
def start(body: dict[str, Any]) -> dict[str, Any]:
    """Start a model on a GPU, in the background; what runs there already is answered as it is.

    `status` goes from STARTING to RUNNING, or to ERROR with a `reason`; a start of what is in ERROR tries again.
    """
    name, gpu_id, config = body["model_name"], body["gpu_id"], body["config"] or {}
    # A value may be a secret; which options were set says enough.
    with _audited("model.start", model_name=name, gpu_id=gpu_id, config=sorted(config), force=body["force"]):
        instance = _edge().host.instances.start(name, gpu_id, config, force=body["force"])
    return _instance_info(instance)


@blueprint.post("/models/stop")
@needs(Scope.ADMIN)
@blueprint.arguments(StopRequest())
@blueprint.response(200, ModelInstanceInfo)
@blueprint.alt_response(404, description="The model is not known, or not there on that GPU.")
@blueprint.alt_response(503, description="Its backend does not answer.")
def stop(body: dict[str, Any]) -> dict[str, Any]:
    """Stop a model on a GPU; answers once it is gone and its memory is back, which may take half a minute."""
    name, gpu_id = body["model_name"], body["gpu_id"]
    with _audited("model.stop", model_name=name, gpu_id=gpu_id):
        instance = _edge().host.instances.stop(name, gpu_id)
    return _instance_info(instance)


@blueprint.get("/models/status")
@needs(Scope.READ)
@blueprint.response(200, ModelStatusItem(many=True))
def status() -> list[dict[str, Any]]:
    """Every model that was started and not stopped, by GPU."""
    return [_view(instance) for instance in _edge().host.instances.all()]


@blueprint.get("/models/status/<model_name>")
@needs(Scope.READ)
@blueprint.response(200, ModelStatusItem(many=True))
@blueprint.alt_response(404, description="No such model is supported.")
def status_of(model_name: str) -> list[dict[str, Any]]:
    """One model by GPU; an empty list if it was not started."""
    return [_view(instance) for instance in _edge().host.instances.of(model_name)]


@blueprint.get("/models/supported")
@needs(Scope.READ)
@blueprint.response(200, SupportedModelView(many=True))
def supported() -> list[dict[str, Any]]:
    """Every model that can be started."""
    return [
        {
            "model_name": model.name,
            "model_type": runner,
            "instances_per_gpu": model.instances_per_gpu,
            "memory_gib": model.memory_gib,
        }
        for runner, model in _edge().host.instances.supported()
    ]


@blueprint.get("/models/instances")
@needs(Scope.READ)
@blueprint.response(200, ModelInstanceView(many=True))
def instances() -> list[dict[str, Any]]:
    """Every model that was started and not stopped, with all that is known of it."""
    return [_view(instance) for instance in _edge().host.instances.all()]


@blueprint.get("/models/<model_name>/logs")
# What a server writes may hold its clients' data, or a token.
@needs(Scope.ADMIN)
@blueprint.arguments(LogQuery(), location="query")
@blueprint.response(200, LogView)
@blueprint.alt_response(404, description="The model is not known, or not there.")
def logs(query: dict[str, Any], model_name: str) -> dict[str, Any]:
    """The last lines that a model's server wrote."""
    lines = _edge().host.instances.log(model_name, query["tail"], query["gpu_id"])
    return {"model_name": model_name, "lines": lines}


def _edge() -> Edge:
    edge: Edge = current_app.extensions["gpu_admin"]
    return edge


@contextmanager
def _audited(event: str, **facts: Any) -> Iterator[None]:
    """Note what came of a change, whatever that is."""
    edge = _edge()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    except HostError as error:
        outcome = error.detail
        raise
    finally:
        edge.host.audit.record(event, edge.caller(), **facts, outcome=outcome)


def _pid(text: str) -> int:
    # Which numbers can be ended is for Processes to say; Python refuses to read some thousand digits.
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise BadRequest(f"pid: must be the number of a process, not {text[:32]!r}.")
    return int(text)


def _gpu_info(gpu: Gpu) -> dict[str, Any]:
    return {
        "id": gpu.id,
        "memory_usage": _rounded(gpu.memory_percent),
        "power_draw": _rounded(gpu.power_w),
        "processes": [
            {
                "pid": process.pid,
                "name": process.name,
                "gpu_memory_usage": process.memory_mib,
                "started_at": process.started_at,
            }
            for process in gpu.processes
        ],
        "name": gpu.name,
        "uuid": gpu.uuid,
        "memory_total": gpu.memory_total_mib,
        "memory_used": gpu.memory_used_mib,
        "utilization": gpu.utilization_percent,
        "temperature": gpu.temperature_c,
        "error": gpu.error,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _instance_info(instance: Instance) -> dict[str, Any]:
    """What ModelInstanceInfo takes: the instance, and its model's other ones."""
    wanted, seen = instance.wanted, instance.seen
    there: list[Instance] = []
    # The last one of a model that the settings name no more has just been stopped.
    with suppress(NotFound):
        there = _edge().host.instances.of(wanted.model_name)
    live = [other for other in there if _counts(other)]
    # A server that runs already, or came up meanwhile, has both before its model does.
    server = next((other.seen for other in live if other.wanted.key == wanted.key), seen)
    return {
        "model_name": wanted.model_name,
        "model_type": instance.runner,
        "active_gpu_ids": sorted({gpu_id for other in live for gpu_id in other.wanted.gpu_ids}),
        "total_instances": _copies(live, wanted.model_name),
        "status": seen.status,
        "pid": server.pid,
        "port": server.port,
        "created_at": instance.created_at,
        "updated_at": instance.since,
        "gpu_id": wanted.gpu_id,
        "reason": seen.reason,
    }


def _counts(instance: Instance) -> bool:
    return instance.seen.status in (InstanceStatus.STARTING, InstanceStatus.RUNNING)


def _copies(live: Sequence[Instance], model_name: str) -> int:
    """Copies of the model on all of those: as they serve, or as they will."""
    per_gpu = next(
        (model.instances_per_gpu for _, model in _edge().host.instances.supported() if model.name == model_name), 1
    )
    return sum(each.seen.copies if each.seen.status is InstanceStatus.RUNNING else per_gpu for each in live)


def _view(instance: Instance) -> dict[str, Any]:
    """What ModelInstanceView and ModelStatusItem take."""
    wanted, seen = instance.wanted, instance.seen
    return {
        "model_name": wanted.model_name,
        "model_type": instance.runner,
        "gpu_id": wanted.gpu_id,
        "status": seen.status,
        "gpu_ids": wanted.gpu_ids,
        "reason": seen.reason,
        "pid": seen.pid,
        "port": seen.port,
        "gpu_memory_mib": instance.memory_mib,
        "memory_gib": instance.memory_gib,
        "since": instance.since,
        "created_at": instance.created_at,
    }
