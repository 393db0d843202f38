"""The workers resource: who serves, where, what became of those that do not, and the orders to drain and resume."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flask import current_app
from marshmallow import Schema, fields

from app.auth import caller, requires
from app.dispatch import Dispatch, Unavailable
from app.errors import WorkerNotFound
from app.keys import Scope
from app.links import Down, Link, Mailbox, mailboxes
from app.parsing import Blueprint
from app.schemas import Timestamp, known_region
from engines.catalogue import JobType
from tasks import reliability
from tasks.fleet import Card, WorkerState

logger = logging.getLogger(__name__)

blueprint = Blueprint("workers", __name__, url_prefix="/api/v1/workers", description="Who serves, and where.")


class WorkersQuery(Schema):
    """Which workers to show or count."""

    region = fields.String(load_default=None, validate=known_region, metadata={"example": "asia-east"})
    type = fields.Enum(JobType, by_value=True, load_default=None)
    state = fields.Enum(WorkerState, by_value=True, load_default=None)


class SlotsView(Schema):
    """Jobs at once, and how many run."""

    total = fields.Integer()
    used = fields.Integer()


class WorkerView(Schema):
    """One worker. One that was ordered to drain and is not there has a name only."""

    worker_id = fields.String(metadata={"description": "One per process start."})
    name = fields.String(metadata={"description": "The same after a restart; orders and reliability belong to it."})
    region = fields.String()
    country = fields.String(allow_none=True)
    city = fields.String(allow_none=True)
    host = fields.String()
    device = fields.String(metadata={"example": "cuda:0"})
    state = fields.Enum(WorkerState, by_value=True)
    drained = fields.Boolean(metadata={"description": "It is ordered to take no new jobs, until it is told to resume."})
    types = fields.List(fields.String())
    models = fields.Dict(fields.String(), fields.String(), metadata={"description": "By job type."})
    gpu_name = fields.String(allow_none=True, metadata={"description": "null on a CPU."})
    gpu_memory = fields.Float(allow_none=True, metadata={"description": "All of its memory, in GiB."})
    slots = fields.Nested(SlotsView)
    slots_by_type = fields.Dict(fields.String(), fields.Nested(SlotsView))
    reliability_score = fields.Float(metadata={"description": "0.95 for a new worker; docs/fleet.md has the formula."})
    version = fields.String(metadata={"description": "Of the platform's code that it runs."})
    started_at = Timestamp()
    last_beat = Timestamp(metadata={"description": "By its store's clock."})
    direct_url = fields.String(allow_none=True, metadata={"description": "null without direct mode."})


class WorkerList(Schema):
    """Workers that are there or were lost within a day; without the admin scope, their numbers."""

    total = fields.Integer()
    by_region = fields.Dict(fields.String(), fields.Integer())
    by_type = fields.Dict(fields.String(), fields.Integer())
    by_state = fields.Dict(fields.String(), fields.Integer())
    unreachable = fields.List(
        fields.String(), metadata={"description": "Regions whose store does not answer; their workers are not counted."}
    )
    items = fields.List(fields.Nested(WorkerView), allow_none=True, metadata={"description": "null without admin."})


_VIEW = WorkerView()


@dataclass(frozen=True, slots=True)
class Shown:
    """A worker as an admin is shown it."""

    link: Link
    card: Card
    #: Unix seconds by its store's clock.
    last_beat: float
    drained: bool

    def view(self, score: float) -> dict[str, Any]:
        """What WorkerView takes."""
        card = self.card
        return {
            "worker_id": card.worker_id,
            "name": card.name,
            "region": card.region,
            "country": card.country,
            "city": card.city,
            "host": card.host,
            "device": card.device,
            "state": card.state,
            "drained": self.drained,
            "types": list(card.slots),
            "models": card.models,
            "gpu_name": card.gpu_name,
            "gpu_memory": card.gpu_memory_gib,
            "slots": {"total": sum(card.slots.values()), "used": sum(card.busy.values())},
            "slots_by_type": {
                job_type: {"total": slots, "used": card.busy.get(job_type, 0)} for job_type, slots in card.slots.items()
            },
            "reliability_score": round(score, 4),
            "version": card.version,
            "started_at": card.started_at,
            "last_beat": self.last_beat,
            "direct_url": card.direct_url,
        }


@blueprint.get("")
@requires(Scope.INFER, Scope.READ)
@blueprint.arguments(WorkersQuery(), location="query")
@blueprint.response(200, WorkerList)
@blueprint.alt_response(503, description="No region can be reached.")
def index(query: dict[str, Any]) -> dict[str, Any]:
    """Workers by region, type and state; with the admin scope, each of them too.

    Also those that were lost within a day: they ended or fell silent without being told to. One that was stopped is
    not shown.
    """
    links = _links()
    wanted = [links[query["region"]]] if query["region"] else list(links.values())
    found, unreachable = _read(wanted)
    if len(unreachable) == len(wanted):
        raise Unavailable("region_unavailable", f"The store of {', '.join(unreachable)} does not answer.")
    found = [
        shown
        for shown in found
        if query["type"] in (None, *shown.card.slots) and query["state"] in (None, shown.card.state)
    ]
    found.sort(key=lambda shown: (shown.card.region, shown.card.name, shown.card.worker_id))
    return {
        "total": len(found),
        "by_region": Counter(shown.card.region for shown in found),
        "by_type": Counter(job_type for shown in found for job_type in shown.card.slots),
        "by_state": Counter(shown.card.state for shown in found),
        "unreachable": unreachable,
        "items": _views(found) if Scope.ADMIN in caller().scopes else None,
    }


@blueprint.get("/<worker>")
@requires(Scope.ADMIN)
@blueprint.response(200, WorkerView)
@blueprint.alt_response(404, description="No such worker.")
@blueprint.alt_response(503, description="It may be in a region that cannot be reached.")
def show(worker: str) -> dict[str, Any]:
    """One worker, by its worker_id or its name; of several with one name, the one that started last."""
    return _views(_find(worker))[0]


@blueprint.post("/<worker>/drain")
@requires(Scope.ADMIN)
@blueprint.response(202, WorkerView)
@blueprint.alt_response(404, description="No such worker.")
@blueprint.alt_response(503, description="It may be in a region that cannot be reached; nothing was ordered.")
def drain(worker: str) -> dict[str, Any]:
    """Order a worker to take no new jobs; those that it runs may end, and its process stays.

    By worker_id or name. The order belongs to the name: it holds after a restart, until the worker is told to resume.
    A live worker follows within a second or so, and shows it as its state.
    """
    found = _find(worker)
    _order(found, drain=True)
    return _views([replace(shown, drained=True) for shown in found])[0]


@blueprint.post("/<worker>/resume")
@requires(Scope.ADMIN)
@blueprint.response(202, WorkerView)
@blueprint.alt_response(404, description="No such worker, nor an order for one of that name.")
@blueprint.alt_response(503, description="It may be in a region that cannot be reached; nothing was ordered.")
def resume(worker: str) -> dict[str, Any]:
    """Take the order to drain back, also of a worker that is not there. By worker_id or name."""
    try:
        found = _find(worker)
    except (WorkerNotFound, Unavailable):
        if not _forget(worker):
            raise
        return {"name": worker, "drained": False}
    _order(found, drain=False)
    return _views([replace(shown, drained=False) for shown in found])[0]


def everyone(links: Mapping[str, Link]) -> list[dict[str, Any]]:
    """Every worker of the regions that can be reached, as an admin is shown it. Raises Unavailable."""
    found, _ = _read(links.values())
    found.sort(key=lambda shown: (shown.card.region, shown.card.name, shown.card.worker_id))
    views: list[dict[str, Any]] = _VIEW.dump(_views(found), many=True)
    return views


def _links() -> Mapping[str, Link]:
    dispatch: Dispatch = current_app.extensions["dispatch"]
    return dispatch.links


def _read(links: Iterable[Link]) -> tuple[list[Shown], list[str]]:
    """The workers of the regions, and the regions that cannot be reached."""
    shared: dict[int, list[Link]] = {}
    for link in links:
        shared.setdefault(id(link.mailbox), []).append(link)
    found: list[Shown] = []
    unreachable: list[str] = []
    for regions in shared.values():
        mailbox, by_region = regions[0].mailbox, {link.region.name: link for link in regions}
        try:
            with mailbox.breaker:
                seen, orders = mailbox.ledger.presence.workers(), mailbox.ledger.presence.orders()
        except Down:
            unreachable += by_region
            continue
        for one in seen:
            card = Card.decode(one.card)
            if card.region in by_region:
                known = card if one.alive else replace(card, state=WorkerState.LOST, busy={})
                found.append(Shown(by_region[card.region], known, one.last_beat, card.name in orders))
    return found, unreachable


def _find(worker: str) -> list[Shown]:
    """The workers of that id or name, the one that started last first. Raises WorkerNotFound, or Unavailable."""
    found, unreachable = _read(_links().values())
    matching = [shown for shown in found if worker in (shown.card.worker_id, shown.card.name)]
    if matching:
        return sorted(matching, key=lambda shown: (shown.card.state is not WorkerState.LOST, shown.card.started_at))[
            ::-1
        ]
    if unreachable:
        message = f"It is in no region that answers; the store of {', '.join(unreachable)} does not."
        raise Unavailable("region_unavailable", message)
    raise WorkerNotFound(worker)


def _views(found: list[Shown]) -> list[dict[str, Any]]:
    """What WorkerView takes, for each. Raises Unavailable."""
    scores: dict[tuple[int, str], float] = {}
    for mailbox, shared in _by_mailbox(found):
        with _answering(mailbox):
            tallies = mailbox.ledger.presence.tallies(shown.card.name for shown in shared)
        scores |= {(id(mailbox), name): reliability.score(tally) for name, tally in tallies.items()}
    return [shown.view(scores[id(shown.link.mailbox), shown.card.name]) for shown in found]


def _order(found: list[Shown], *, drain: bool) -> None:
    """Tell the workers, and whoever has their names later. Raises Unavailable."""
    for mailbox, shared in _by_mailbox(found):
        ids: dict[str, list[str]] = {}
        for shown in shared:
            ids.setdefault(shown.card.name, []).append(shown.card.worker_id)
        for name, worker_ids in ids.items():
            with _answering(mailbox):
                mailbox.ledger.presence.order(name, worker_ids, drain=drain)
            logger.info("worker %s is told to %s by %s", name, "drain" if drain else "resume", caller().key)


def _forget(name: str) -> bool:
    """Take back the order for a worker that is not there; False if no region that answers has one."""
    forgot = False
    for mailbox in mailboxes(_links()):
        try:
            with mailbox.breaker:
                if name in mailbox.ledger.presence.orders():
                    mailbox.ledger.presence.order(name, (), drain=False)
                    forgot = True
        except Down:
            continue
    return forgot


def _by_mailbox(found: Iterable[Shown]) -> list[tuple[Mailbox, list[Shown]]]:
    shared: dict[int, tuple[Mailbox, list[Shown]]] = {}
    for shown in found:
        shared.setdefault(id(shown.link.mailbox), (shown.link.mailbox, []))[1].append(shown)
    return list(shared.values())


@contextmanager
def _answering(mailbox: Mailbox) -> Iterator[None]:
    try:
        with mailbox.breaker:
            yield
    except Down as down:
        raise Unavailable("region_unavailable", str(down)) from down
