"""Direct mode: which worker a client may bring its job to, and the token that lets it in (tasks/direct.py)."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from flask import current_app, request
from marshmallow import Schema, ValidationError, fields

from app.auth import caller, requires
from app.dispatch import Dispatch
from app.errors import Invalid, Problem
from app.keys import Scope
from app.links import Down, Link
from app.origin import HEADER, UnknownRegion, address_here, find_here
from app.parsing import Blueprint
from app.quotas import QuotaCap
from app.schemas import Timestamp, known_region
from app.settings import Settings
from engines.catalogue import JobType, UnknownModel
from tasks import addresses, reliability, routing
from tasks.fleet import Card, able
from tasks.tokens import Token

blueprint = Blueprint("direct", __name__, url_prefix="/api/v1/jobs/direct", description="Bring a job to its worker.")

#: Workers that are relied on less than this are not offered; the queue goes on using them.
LEAST_SCORE = 0.5
_SECURE_PORT, _PLAIN_PORT = 443, 80


class NoDirectWorker(Problem):
    """Nobody serves such a job directly now; the queue may."""

    status = HTTPStatus.NOT_FOUND
    code = "no_direct_worker"


class Address(fields.String):
    """An IP address in its one form."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> str:
        try:
            return addresses.plain_address(super()._deserialize(value, *args, **kwargs))
        except ValueError as error:
            raise ValidationError("Must be an IP address.") from error


class NearestQuery(Schema):
    """For what job, and from where."""

    job_type = fields.Enum(JobType, by_value=True, required=True)
    model = fields.String(load_default=None, metadata={"description": "Only a worker that has this model loaded."})
    region = fields.String(
        load_default=None,
        validate=known_region,
        metadata={"example": "asia-east", "description": "Where to look first; left out, where the client is."},
    )
    allow_cross_region = fields.Boolean(
        load_default=True, metadata={"description": "false: only workers of that region."}
    )
    client_address = Address(
        load_default=None,
        metadata={
            "description": "The address that the worker sees the client at, where that is not the one that the API "
            "sees; the token is good from there only.",
        },
    )


class NearestView(Schema):
    """A worker, and the token that lets one job in there."""

    worker_id = fields.String(attribute="card.worker_id")
    direct_url = fields.String(
        attribute="card.direct_url",
        metadata={"description": "POST the job to /api/v1/jobs/sync or /api/v1/jobs/stream there."},
    )
    region = fields.String(attribute="card.region")
    client_region = fields.String()
    gpu_model = fields.String(attribute="card.gpu_name", allow_none=True, metadata={"description": "null on a CPU."})
    reliability_score = fields.Float(metadata={"example": 0.95})
    token = fields.String(metadata={"description": "Send it there as Authorization: Bearer; it lets one job in."})
    expires_at = Timestamp(metadata={"description": "When the token ends to let a job in."})


@dataclass(frozen=True, slots=True)
class Offer:
    """A worker that serves such a job directly."""

    card: Card
    #: What people see, and what workers are ordered by.
    score: float
    rank: float
    free: int


@dataclass(frozen=True, slots=True)
class Nearest:
    """The worker that a client is sent to."""

    card: Card
    client_region: str
    reliability_score: float
    token: str
    #: Unix seconds.
    expires_at: float


@blueprint.get("/nearest")
@requires(Scope.INFER)
@blueprint.arguments(NearestQuery(), location="query")
@blueprint.response(200, NearestView)
@blueprint.alt_response(404, "NOT_FOUND")
def nearest(query: dict[str, Any]) -> Nearest:
    """The nearest worker that takes such a job over its own port, and a token for it.

    Ordered by the distance of regions, then by reliability, then by free slots. The token lets one job in, within a
    minute, from the client's address only. 404 with code no_direct_worker where there is none: send the job to the
    queue.
    """
    dispatch: Dispatch = current_app.extensions["dispatch"]
    quotas: QuotaCap = current_app.extensions["quotas"]
    quotas.admit(caller())
    job_type: JobType = query["job_type"]
    try:
        model = None if query["model"] is None else dispatch.placement.model_id(job_type, query["model"])
        home = find_here(query["region"]).region
    except UnknownModel as error:
        raise Invalid({"model": [str(error)]}) from error
    except UnknownRegion as error:
        raise Invalid({HEADER: [str(error)]}) from error

    full: tuple[Link, Offer] | None = None
    for link, offer in _nearest_first(dispatch, home, job_type, model, cross_region=query["allow_cross_region"]):
        if offer.free > 0:
            try:
                return _let_in(link, offer, job_type, home, query["client_address"])
            except Down:
                continue
        full = full or (link, offer)
    if full is not None:
        # What is known of it is up to two seconds old: it may have a free slot by now.
        try:
            return _let_in(*full, job_type, home, query["client_address"])
        except Down:
            pass
    where = "" if query["allow_cross_region"] else f" in {home}"
    what = job_type if model is None else f"{job_type} with {model}"
    raise NoDirectWorker(f"No live worker{where} serves {what} directly; POST /api/v1/jobs takes such a job.")


def _nearest_first(
    dispatch: Dispatch, home: str, job_type: JobType, model: str | None, *, cross_region: bool
) -> Iterator[tuple[Link, Offer]]:
    """Every worker that could be offered; a region is asked only once those before it are exhausted."""
    here = dispatch.links[home].region
    links = sorted(dispatch.links.values(), key=lambda link: routing.distance_km(here, link.region))
    for link in links if cross_region else [dispatch.links[home]]:
        try:
            offers = _offers(link, job_type, model)
        except Down:
            continue
        for offer in sorted(offers, key=lambda offer: (-offer.rank, -offer.free, offer.card.worker_id)):
            yield link, offer


def _offers(link: Link, job_type: JobType, model: str | None) -> list[Offer]:
    """The region's workers that serve such a job directly and can be relied on. Raises Down."""
    cards = [card for card in able(link.cards(), job_type, model) if card.direct_url is not None]
    if not cards:
        return []
    with link.mailbox.breaker:
        tallies = link.mailbox.ledger.presence.tallies(card.name for card in cards)
    offers = [
        Offer(
            card=card,
            score=reliability.score(tallies[card.name]),
            rank=reliability.rank(tallies[card.name]),
            free=card.slots[job_type] - card.busy.get(job_type, 0),
        )
        for card in cards
    ]
    return [offer for offer in offers if offer.score >= LEAST_SCORE]


def _let_in(link: Link, offer: Offer, job_type: JobType, home: str, stated: str | None) -> Nearest:
    """The offer with a token for it. Raises Down."""
    settings: Settings = current_app.extensions["settings"]
    with link.mailbox.breaker:
        secret = link.mailbox.ledger.direct_secret()
    now = int(time.time())
    dispatch: Dispatch = current_app.extensions["dispatch"]
    job_id = str(uuid.uuid4())
    token = Token(
        job_id=job_id,
        worker_id=offer.card.worker_id,
        owner=caller().owner,
        type=job_type,
        address=stated or _client_address(offer.card.direct_url or ""),
        issued_at=now,
        expires_at=now + settings.direct_token_s,
        ticket=dispatch.tickets.sign(job_id, 1, link.region.name),
    )
    return Nearest(offer.card, home, round(offer.score, 4), token.sign(secret), token.expires_at)


def _client_address(direct_url: str) -> str:
    """The address at which the worker will see the client, as far as can be told from here."""
    address = addresses.plain_address(str(address_here() or request.remote_addr or "::"))
    if not addresses.is_loopback(address):
        return address
    # A program on this host: the worker sees it at the address that this host has on the way there.
    url = urlsplit(direct_url)
    port = url.port or (_SECURE_PORT if url.scheme == "https" else _PLAIN_PORT)
    try:
        return addresses.plain_address(addresses.own_address(url.hostname, port))
    except OSError:
        return address
