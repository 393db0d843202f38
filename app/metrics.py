"""`GET /metrics` for Prometheus: of the API on its own port, of a control process on one of its own.

The same Guard stands before both: programs on the same host while no key exists, else a key of scope read (or admin) as
a Bearer token. docs/metrics.md says who shows what.
"""

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import waitress
from flask import Blueprint, Flask, Response, current_app, g, request
from prometheus_client.exposition import choose_encoder

from app import errors
from app.auth import Guard, requires
from app.dispatch import Dispatch
from app.gauges import Platform
from app.keys import Keys, Scope
from app.metering import Metering
from app.settings import Settings
from tasks import logs, tracing

logger = logging.getLogger(__name__)

blueprint = Blueprint("metrics", __name__)

#: Prometheus, and whoever looks by hand.
THREADS = 3


@blueprint.get("/metrics")
@requires(Scope.READ)
def show() -> Response:
    """What this process counted and sees."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    metering: Metering = current_app.extensions["metering"]
    return Response(encode(metering.registry), content_type=content_type)


def register(app: Flask, metering: Metering) -> None:
    """Count the app's requests, and bind what it logs and traces meanwhile; before anything else looks at them."""
    app.extensions["metering"] = metering

    @app.before_request
    def begin() -> None:
        g.began = time.perf_counter()
        job_id = (request.view_args or {}).get("job_id")
        logs.of_request(errors.request_id(), job_id)
        if tracing.on():
            route = request.url_rule.rule if request.url_rule else "unknown"
            given = request.headers.get("traceparent", "")
            g.tracing = contextlib.ExitStack()
            named = tracing.span(f"{request.method} {route}", parent=given, kind="server", job_id=job_id)
            g.span = g.tracing.enter_context(named)

    @app.after_request
    def answered(response: Response) -> Response:
        began: float | None = g.get("began")
        if began is not None:
            seconds = time.perf_counter() - began
            metering.requested(request.endpoint, request.method, response.status_code, seconds)
        if "span" in g:
            g.span.set_attribute("http.response.status_code", response.status_code)
        return response

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        if (opened := g.pop("tracing", None)) is not None:
            opened.close()
        logs.of_request(None)


class ControlServer:
    """The port of a control process: one of its chores (app/control.py)."""

    def __init__(self, dispatch: Dispatch, keys: Keys, settings: Settings) -> None:
        """Listens from now on. Raises OSError."""
        self._dispatch = dispatch
        self._folders = _folders(settings)
        app = Flask("control", static_folder=None)
        errors.register(app)
        register(app, dispatch.metering)
        app.before_request(Guard(keys, allow_anonymous=settings.allow_anonymous).admit)
        app.register_blueprint(blueprint)
        self._server: Any = waitress.create_server(
            app,
            host=settings.control_metrics_host,
            port=settings.control_metrics_port,
            threads=THREADS,
            ident=None,
            # The Guard has to see that a request came through a proxy.
            clear_untrusted_proxy_headers=False,
        )

    def run(self, leads: threading.Event, stopped: threading.Event) -> None:
        """Serve until stopped is set; the platform's state while this process leads."""
        self._dispatch.metering.registry.register(Platform(self._dispatch, leads, self._folders))
        threading.Thread(target=self._server.run, name="metrics", daemon=True).start()
        stopped.wait()
        self._server.close()


def _folders(settings: Settings) -> dict[str, Path]:
    """What lies on disks of this host."""
    found = {}
    if "://" not in settings.blobs_url:
        found["blobs"] = Path(settings.blobs_url)
    _, _, path = settings.database_url.partition("sqlite:///")
    if path:
        found["database"] = Path(path).parent
    return found
