"""The OpenAPI document, and Swagger UI from the installed package: nothing is loaded from elsewhere."""

from typing import Any

import flask_smorest
from flask import Blueprint, Flask, Response, current_app, jsonify, send_from_directory, url_for
from swagger_ui_bundle import swagger_ui_path

from gpu_admin.auth import public
from gpu_admin.schemas import ErrorView

# Not flask-smorest's: these pages are no part of the API they describe.
blueprint = Blueprint("docs", __name__)

TITLE = "Model Inference Client API"
DESCRIPTION = """
The GPUs, processes and model servers of one host. Starting a model answers at once with `STARTING`; ask
`GET /api/v1/models/instances` for what became of it.

Errors are `{"detail": ...}`. Times are RFC 3339 in UTC. Looking needs a key of scope `read`, changing anything one of
scope `admin`; while no key exists, programs on the host itself need none.
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
    """flask-smorest's collector of the document; answering errors is gpu_admin/errors.py's business."""

    ERROR_SCHEMA = ErrorView

    def _register_error_handlers(self) -> None:
        pass


def open_api(app: Flask) -> Api:
    """The document that the app's blueprints write themselves into."""
    app.config.update(API_TITLE=TITLE, API_VERSION="1", OPENAPI_VERSION="3.0.3")
    security: list[dict[str, list[str]]] = [{"X-API-Key": []}, {"Bearer": []}]
    api = Api(app, spec_kwargs={"info": {"description": DESCRIPTION}, "security": security})
    api.spec.components.security_scheme("X-API-Key", {"type": "apiKey", "in": "header", "name": "X-API-Key"})
    api.spec.components.security_scheme("Bearer", {"type": "http", "scheme": "bearer"})
    return api


@blueprint.get("/openapi.json")
@public
def openapi() -> Response:
    """The OpenAPI document."""
    return jsonify(current_app.extensions["api"].spec.to_dict())


@blueprint.get("/docs")
@public
def page() -> Response:
    """Swagger UI."""
    text = PAGE.format(title=TITLE, assets=url_for("docs.asset", name=""), openapi=url_for("docs.openapi"))
    return Response(text, mimetype="text/html", headers={"Content-Security-Policy": POLICY})


@blueprint.get("/docs/start.js")
@public
def start() -> Response:
    """Starts Swagger UI; a file of its own, since the policy allows no inline script."""
    return Response(START, mimetype="text/javascript")


@blueprint.get("/docs/<path:name>")
@public
def asset(name: str) -> Any:
    """A file of the installed Swagger UI."""
    return send_from_directory(swagger_ui_path, name, max_age=3600)
