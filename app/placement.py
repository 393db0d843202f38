"""Where a job goes, which models are there for it, and where it stands once it waits."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from app import waiting
from app.job_table import JobRow
from app.links import Down, Link
from app.request import Request
from app.turns import HeldBack
from app.waiting import Place
from engines import catalogue
from engines.catalogue import JobType, UnknownModel
from tasks import fleet, routing
from tasks.fleet import Card
from tasks.job import JobState
from tasks.records import Standing
from tasks.routing import Decision, Offer


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a job if it were sent now."""

    decision: Decision
    #: The place it would have in the queue, 1 is next; None where that is not known.
    position: int | None
    #: Live workers that would take it there.
    available_workers: int
    #: The model that would run it; None where that depends on the worker.
    model: str | None


class Placement:
    """Reads the regions' queues and workers; a region that is away is passed over."""

    def __init__(self, links: Mapping[str, Link], default_region: str, held: HeldBack) -> None:
        self._links = links
        self._regions = {name: link.region for name, link in links.items()}
        self._default_region = default_region
        self._held = held

    def decide(self, request: Request, owner: str | None = None) -> Decision:
        """Where such a job of this owner goes now, and why."""
        home = self.home(request)
        offers = self._offers(request, [home], owner)
        # The others are asked only where one of them might be better: one that is down must not hold up the rest.
        if request.allow_cross_region and not (home in offers and routing.serves_at_once(offers[home])):
            offers |= self._offers(request, [name for name in self._links if name != home], owner)
        what = request.type if request.model is None else f"{request.type} with {request.model}"
        return routing.choose_region(home, self._regions, offers, cross_region=request.allow_cross_region, what=what)

    def forecast(self, request: Request) -> Forecast:
        """What would become of such a job if it were sent now; nothing is kept of it."""
        decision = self.decide(request)
        link = self._links[decision.region]
        try:
            offer = self._offer(link, request, None)
            takers = fleet.able(link.cards(), request.type, request.model)
        except Down:
            return Forecast(decision, None, 0, request.model)
        models = {card.models.get(request.type) for card in takers}
        model = request.model or (models.pop() if len(models) == 1 else None)
        return Forecast(decision, offer.ahead + 1, len(takers), model)

    def has_worker(self, request: Request) -> bool:
        """Whether a live worker may take such a job now."""
        home = self.home(request)
        others = [name for name in self._links if name != home] if request.allow_cross_region else []
        # One after the other: the first that can is enough.
        found = (offer for name in (home, *others) for offer in self._offers(request, [name]).values())
        return any(offer.load.slots > 0 for offer in found)

    def place(self, row: JobRow, standing: Standing | None = None, *, newest: bool = False) -> Place:
        """A queued job's position, estimated wait, and why it waits.

        standing: if it is known already. newest: it has just come.
        """
        if row.status is not JobState.QUEUED:
            return Place()
        if row.held_for is not None:
            own = self._held.own_before(row, newest=newest)
            return waiting.held_place(
                row, self._links, own, self._held.before(row.held_for, row.priority, row.owner, own)
            )
        queue = routing.queue_name(row.region, row.type, row.model)
        return waiting.place(row, self._links, standing, held_before=self._held.more_urgent(queue, row.priority))

    def cards(self) -> list[Card]:
        """The live workers of every region that can be reached."""
        found = []
        for link in self._links.values():
            try:
                found += link.cards()
            except Down:
                continue
        return found

    def model_id(self, job_type: JobType, name: str) -> str:
        """The id of the model that a client means: a row of the catalogue, or what a live worker has loaded.

        Raises UnknownModel with the nearest names.
        """
        live = {
            card.models[job_type].casefold(): card.models[job_type] for card in self.cards() if job_type in card.models
        }
        try:
            return live.get(name.casefold()) or catalogue.find(job_type, name).id
        except UnknownModel as error:
            others = sorted(set(live.values()) - {row.id for row in catalogue.MODELS})
            raise UnknownModel(f"{error} Live: {', '.join(others)}." if others else str(error)) from None

    def home(self, request: Request) -> str:
        """The region that the client asked for or comes from."""
        return request.region or request.client_region or self._default_region

    def _offer(self, link: Link, request: Request, owner: str | None) -> Offer:
        """What a region can do for such a job of this owner. Raises Down."""
        offer = link.offer(request.type, request.model, request.priority)
        queue = routing.queue_name(link.region.name, request.type, request.model)
        return replace(offer, ahead=offer.ahead + self._held.before(queue, request.priority, owner))

    def _offers(self, request: Request, names: Iterable[str], owner: str | None = None) -> dict[str, Offer]:
        """What those of the regions that can be reached can do for such a job."""
        offers = {}
        for name in names:
            try:
                offers[name] = self._offer(self._links[name], request, owner)
            except Down:
                continue
        return offers
