"""The admin API of one host, as a WSGI application."""

from typing import Any

from flask import Flask, Response

from gpu_admin import auth, docs, errors, parsing, routes, schemas
from gpu_admin.environment import read_settings
from gpu_admin.host import open_host
from gpu_admin.keys import Keys
from gpu_admin.settings import Settings

#: Where the resources are; GET / answers by itself.
PREFIX = "/api/v1"

blueprint = parsing.Blueprint("welcome", __name__, description="The service itself.")


@blueprint.get("/")
@auth.public
@blueprint.doc(security=[])
@blueprint.response(200, schemas.Welcome)
def welcome() -> dict[str, Any]:
    """That the service is there; nothing is asked of the host."""
    return {"status": "ok", "message": f"Welcome to the {docs.TITLE}"}


def create_app(settings: Settings | None = None) -> Flask:
    """The API, its keeper thread running; close it by closing `app.extensions["gpu_admin"].host.instances`.

    Without settings, those of .env and the environment. Raises SettingsError.
    """
    settings = settings or read_settings()
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["MAX_CONTENT_LENGTH"] = parsing.MOST_BODY_BYTES

    host = open_host(settings)
    api = docs.open_api(app)
    app.extensions["api"] = api
    errors.register(app)
    app.before_request(auth.Guard(Keys(settings.data_dir), allow_anonymous=settings.allow_anonymous).admit)
    app.after_request(_complete)
    api.register_blueprint(blueprint)
    routes.add_to(app, api, host, auth.caller, prefix=PREFIX)
    app.register_blueprint(docs.blueprint)
    host.instances.watch()
    return app


def _complete(response: Response) -> Response:
    # Answers hold text that others wrote: no browser may take it for a page, show it within one, or act on it.
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    return response
