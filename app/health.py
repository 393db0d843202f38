"""Whether the API lives, and whether it can take jobs."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from flask import current_app
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from app.auth import public
from app.dispatch import Dispatch
from app.parsing import Blueprint
from app.schemas import HealthView, ReadyView
from app.tables import is_current

logger = logging.getLogger(__name__)

blueprint = Blueprint("health", __name__, description="For load balancers, and for people who wonder.")

#: A check that has not answered by then counts as failed.
CHECK_S = 1.5
OK = "ok"

# Few: checks that hang must not pile up, and one that finds no thread fails, as it should.
_checkers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="ready")

T = TypeVar("T")


@blueprint.get("/health")
@public
@blueprint.doc(security=[])
@blueprint.response(200, HealthView)
def health() -> dict[str, str]:
    """Whether the process answers; nothing else is looked at."""
    return {"status": OK}


@blueprint.get("/ready")
@public
@blueprint.doc(security=[])
@blueprint.response(200, ReadyView)
@blueprint.alt_response(503, schema=ReadyView, description="No job can be taken, or none can be sent.")
def ready() -> Any:
    """Whether jobs can be taken and sent.

    503 if the database cannot be used or no region answers. While some regions do it is `degraded`: jobs of the others
    are kept and sent later.
    """
    dispatch: Dispatch = current_app.extensions["dispatch"]
    asked_database = _checkers.submit(_database, current_app.extensions["database"])
    asked_regions = _checkers.submit(dispatch.check)
    both: Sequence[Future[Any]] = (asked_database, asked_regions)
    wait(both, timeout=CHECK_S)
    slow = f"No answer within {CHECK_S:g} s."
    database = _result(asked_database, slow)
    unknown: dict[str, str | None] = dict.fromkeys(dispatch.links, slow)
    regions = {name: state or OK for name, state in _result(asked_regions, unknown).items()}
    wrong = [where for where, state in {"database": database, **regions}.items() if state != OK]
    if wrong:
        logger.warning("not fully ready: %s", ", ".join(wrong))
    if database != OK or OK not in regions.values():
        return {"status": "unready", "database": database, "regions": regions}, 503, {"Retry-After": "2"}
    return {"status": "degraded" if wrong else "ready", "database": database, "regions": regions}


def _database(engine: Engine) -> str:
    try:
        return OK if is_current(engine) else "It lacks migrations: flask --app wsgi db upgrade"
    except SQLAlchemyError as error:
        logger.warning("the database cannot be used: %s", getattr(error, "orig", None) or error)
        return f"It cannot be used ({type(error).__name__}); the log says why."


def _result(check: Future[T], slow: T) -> T:
    if check.done():
        return check.result()
    check.cancel()
    return slow
