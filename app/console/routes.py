"""What the console asks beside the API itself: who am I, what is now, what was the last hour."""

from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify
from sqlalchemy import Engine

from app.auth import ANONYMOUS, LOCAL, caller, requires
from app.console import pages
from app.console.feed import Feed
from app.console.history import History
from app.dispatch import Dispatch
from app.keys import Scope
from app.settings import Settings
from app.streams import Streams, sse
from app.submission import take_turn
from engines.catalogue import JobType
from tasks.job import JobState

# Not flask-smorest's: it serves one page, and changes with it.
blueprint = Blueprint("console", __name__, url_prefix="/api/v1/console")


def register(app: Flask, dispatch: Dispatch, engine: Engine) -> None:
    """Serve the console and its feed."""
    app.extensions["console_feed"] = Feed(dispatch)
    app.extensions["console_history"] = History(engine)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(blueprint)


@blueprint.get("/session")
@requires(Scope.INFER, Scope.READ)
def session() -> Response:
    """Who asks, and what may be chosen from."""
    settings: Settings = current_app.extensions["settings"]
    who = caller()
    return jsonify(
        {
            "key": None if who.key in (LOCAL, ANONYMOUS) else who.key,
            "scopes": sorted(who.scopes),
            "regions": list(settings.regions),
            "types": list(JobType),
            "states": list(JobState),
            #: Whether there are GPU hosts that this caller may manage.
            "hosts": bool(settings.gpu_admin_mount or settings.gpu_hosts) and Scope.ADMIN in who.scopes,
        }
    )


@blueprint.get("/events")
@requires(Scope.INFER, Scope.READ)
def events() -> Response:
    """The platform as it is now, and every change of that."""
    feed: Feed = current_app.extensions["console_feed"]
    streams: Streams = current_app.extensions["streams"]
    # A database that is away is a 503, not a stream that says nothing.
    feed.picture()
    release = take_turn()
    return sse(feed.follow(streams.stopping, everything=Scope.ADMIN in caller().scopes), on_close=release)


@blueprint.get("/history")
@requires(Scope.INFER, Scope.READ)
def history() -> Any:
    """The last hour by minute: every job's for admins, else one's own."""
    told: History = current_app.extensions["console_history"]
    owner = caller().sees
    return jsonify({"minutes": told.everybody() if owner is None else told.of(owner), "own": owner is not None})
