"""The console's files, as they lie in static/: no build step, nothing from elsewhere, nothing inline."""

import gzip
import mimetypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, abort, redirect, request, url_for
from werkzeug.security import safe_join

from app.auth import public

# Not flask-smorest's: a page for people is no part of the API it uses.
blueprint = Blueprint("console_pages", __name__)

STATIC = Path(__file__).parent / "static"
#: Results are shown as data: and blob: addresses, pictures and sounds; everything else must come from here.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
#: What the playground records, the page may hear; whatever else is off for every answer stays off.
PERMISSIONS = "camera=(), display-capture=(), geolocation=(), microphone=(self), payment=(), usb=()"
#: Kept by the browser, but asked for each time: an upgrade shows at once, and an unchanged file costs a 304.
CACHE = "no-cache"


@blueprint.get("/console")
@public
def home() -> Response:
    """The one page."""
    return _answer("index.html")


@blueprint.get("/console/")
@public
def slash() -> Any:
    """The page's own links are relative to the address without a slash."""
    return redirect(url_for("console_pages.home"))


@blueprint.get("/console/<path:name>")
@public
def asset(name: str) -> Response:
    """A file of the console."""
    return _answer(name)


def _answer(name: str) -> Response:
    path = safe_join(str(STATIC), name)
    if path is None or not Path(path).is_file():
        abort(404)
    plain, packed, etag = _read(path, Path(path).stat().st_mtime_ns)
    mimetype = mimetypes.guess_type(path)[0] or "application/octet-stream"
    response = Response(plain, mimetype="text/javascript" if path.endswith(".js") else mimetype)
    if request.accept_encodings["gzip"] > 0:
        response.set_data(packed)
        response.headers["Content-Encoding"] = "gzip"
        etag += "-gzip"
    response.set_etag(etag)
    response.vary.add("Accept-Encoding")
    response.headers["Cache-Control"] = CACHE
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Permissions-Policy"] = PERMISSIONS
    response.make_conditional(request)
    return response


@lru_cache(maxsize=64)
def _read(path: str, _changed_ns: int) -> tuple[bytes, bytes, str]:
    """A file's bytes, the same packed, and what its state is known by."""
    plain = Path(path).read_bytes()
    return plain, gzip.compress(plain, 9, mtime=0), f"{_changed_ns:x}-{len(plain):x}"
