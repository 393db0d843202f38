"""The OpenAPI document, and Swagger UI from the installed package: nothing is loaded from elsewhere."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import flask_smorest
from flask import Blueprint, Flask, Response, current_app, jsonify, redirect, send_from_directory, url_for
from swagger_ui_bundle import swagger_ui_path

from app.auth import public
from app.errors import MEDIA_TYPE
from app.schemas import ProblemView
from engines.schemas import PARAMS, RESULTS
from tasks.reading import Params

# Not flask-smorest's: these pages are no part of the API they describe.
blueprint = Blueprint("docs", __name__)

TITLE = "Distributed GPU inference"
DESCRIPTION = """
Send a job (`POST /api/v1/jobs`), follow it by its id; or send it and wait (`POST /api/v1/jobs/sync`).

Errors are `application/problem+json`: `code` is for programs, `detail` for people, `errors` names fields by dotted
path. Answer 429 and 503 by waiting for `Retry-After` seconds. Times are RFC 3339 in UTC. Every answer carries
`X-Request-ID`.
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="stylesheet" href="{assets}swagger-ui.css">
<link rel="icon" href="{assets}favicon-32x32.png">
</head>
<body>
<div id="swagger-ui" data-openapi="{openapi}"></div>
<script src="{assets}swagger-ui-bundle.js"></script>
<script src="{assets}start.js"></script>
</body>
</html>
"""
# validatorUrl: by default Swagger UI sends the document to a server on the internet.
START = """window.ui = SwaggerUIBundle({
  url: document.getElementById("swagger-ui").dataset.openapi,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""
#: The bundle draws with inline styles and data images; everything else must come from here.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


class Api(flask_smorest.Api):  # type: ignore[misc]
    """flask-smorest's collector of the document; answering errors is app/errors.py's business.

    The document is written when somebody first asks for it: that takes longer than all else of making an app.
    """

    ERROR_SCHEMA = ProblemView

    def __init__(self, app: Flask, **kwargs: Any) -> None:
        self._spec: Any = None
        self._unwritten: list[Callable[[], None]] = []
        # Who writes reads what is there so far; everybody else waits for the whole.
        self._writing = threading.RLock()
        super().__init__(app, **kwargs)

    @property
    def spec(self) -> Any:
        """The document as an APISpec, whole."""
        with self._writing:
            unwritten, self._unwritten = self._unwritten, []
            for write in unwritten:
                write()
            return self._spec

    @spec.setter
    def spec(self, spec: Any) -> None:
        self._spec = spec

    def later(self, write: Callable[[], None]) -> None:
        """Write more into the document, after what was told before."""
        self._unwritten.append(write)

    def register_blueprint(self, blp: Any, *, parameters: Any = None, **options: Any) -> None:
        """As the base class does, but for the document."""
        name = options.get("name", blp.name)
        self._app.extensions["flask-smorest"]["blp_name_to_api"][name] = self
        self._app.register_blueprint(blp, **options)
        self.later(partial(self._write, blp, name, parameters))

    def _write(self, blueprint: Any, name: str, parameters: Any) -> None:
        blueprint.register_views_in_doc(self, self._app, self.spec, name=name, parameters=parameters)
        self.spec.tag({"name": name, "description": blueprint.description})

    def _init_spec(self, **options: Any) -> None:
        self.later(partial(super()._init_spec, **options))

    def _register_error_handlers(self) -> None:
        pass

    def _register_responses(self) -> None:
        # Errors have a media type of their own, and the base class takes it from here.
        self.DEFAULT_RESPONSE_CONTENT_TYPE = MEDIA_TYPE
        super()._register_responses()
        del self.DEFAULT_RESPONSE_CONTENT_TYPE


def open_api(app: Flask) -> Api:
    """The document that the app's blueprints write themselves into."""
    app.config.update(API_TITLE=TITLE, API_VERSION="1", OPENAPI_VERSION="3.0.3")
    api = Api(
        app,
        spec_kwargs={
            "info": {"description": DESCRIPTION},
            "security": [{"X-API-Key": []}, {"Bearer": []}],
        },
    )
    api.later(partial(_begin, api))
    return api


def _begin(api: Api) -> None:
    components = api.spec.components
    components.security_scheme("X-API-Key", {"type": "apiKey", "in": "header", "name": "X-API-Key"})
    components.security_scheme("Bearer", {"type": "http", "scheme": "bearer"})
    for schema in (*PARAMS.values(), *RESULTS.values()):
        name = type(schema).__name__
        if name not in components.schemas:
            components.schema(name, schema=schema)
    api.ma_plugin.converter.add_attribute_function(_params_of_each_type)


@blueprint.get("/")
@public
def home() -> Any:
    """People who come to the bare address want the documentation."""
    return redirect(url_for("docs.page"))


@blueprint.get("/openapi.json")
@public
def openapi() -> Response:
    """The OpenAPI document."""
    return jsonify(_without_null_defaults(current_app.extensions["api"].spec.to_dict()))


@blueprint.get("/docs")
@public
def page() -> Response:
    """Swagger UI."""
    assets = url_for("docs.asset", name="")
    text = PAGE.format(title=TITLE, assets=assets, openapi=url_for("docs.openapi"))
    return Response(text, mimetype="text/html", headers={"Content-Security-Policy": POLICY})


@blueprint.get("/docs/start.js")
@public
def start() -> Response:
    """Starts Swagger UI; a file of its own, since the policy allows no inline script."""
    return Response(START, mimetype="text/javascript")


@blueprint.get("/docs/<path:name>")
@public
def asset(name: str) -> Response:
    """A file of the installed Swagger UI."""
    return send_from_directory(swagger_ui_path, name, max_age=3600)


def _without_null_defaults(node: Any) -> Any:
    """The document without defaults of null, which apispec writes for fields that may be left out but not be null."""
    if isinstance(node, dict):
        return {
            name: _without_null_defaults(value)
            for name, value in node.items()
            if not (name == "default" and value is None)
        }
    return [_without_null_defaults(entry) for entry in node] if isinstance(node, list) else node


def _params_of_each_type(self: Any, field: Any, **_: Any) -> dict[str, Any]:
    """apispec's hook: what the params of a job look like."""
    if not isinstance(field, Params):
        return {}
    return {"oneOf": [{"$ref": f"#/components/schemas/{type(schema).__name__}"} for schema in PARAMS.values()]}
