"""What waits: where a queued job stands, for how long and why, and the statistics of the queues."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.job_table import JobRow
from app.links import Down, Link, nearest
from app.rows import Rows
from engines.catalogue import JobType
from tasks import routing
from tasks.fleet import Card, WorkerState
from tasks.job import JobState
from tasks.records import Standing
from tasks.routing import Load

_NOT_TAKING = {
    WorkerState.LOADING: "loading",
    WorkerState.DRAINING: "draining",
    WorkerState.OFF_DUTY: "off duty",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a queued job stands; all None for one that no longer waits."""

    position: int | None = None
    estimated_wait_s: float | None = None
    #: A sentence on why it still waits.
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RegionStatistics:
    """One region's queues and workers now; of one that cannot be reached, what the rows say."""

    queued: int
    running: int
    available_workers: int
    #: Seconds since its oldest queued job was accepted; None where none waits.
    oldest_wait_s: float | None
    #: Whether its store answers.
    reachable: bool


@dataclass(frozen=True, slots=True)
class Statistics:
    """Queues and workers now."""

    total_queued: int
    running: int
    available_workers: int
    #: Seconds that a new job of the slowest served type would wait; None where that is not known.
    estimated_wait_s: float | None
    oldest_wait_s: float | None
    by_type: Mapping[JobType, int]
    by_region: Mapping[str, RegionStatistics]


def place(row: JobRow, links: Mapping[str, Link], standing: Standing | None = None, *, held_before: int = 0) -> Place:
    """A queued job's position, estimated wait, and why it waits.

    standing: if it is known already. held_before: more urgent jobs that are in no store yet.
    """
    link = links.get(row.region)
    try:
        if link is None:
            raise Down
        load = link.load(row.type, row.model)
        if standing is None:
            queue = routing.queue_name(row.region, row.type, row.model)
            beside = link.beside(row.type, row.model)
            with link.mailbox.breaker:
                standing = link.mailbox.ledger.standing(row.id, queue, beside)
        if load.slots == 0:
            position = None if standing is None else standing.before + held_before + 1
            return Place(position, None, _why_nobody(row, link.cards(), links))
    except Down:
        return Place(reason=_why_unreachable(row))
    if standing is None:
        moved = row.attempt > row.losses + 1
        return Place(reason=f"It was sent {'anew ' if moved else ''}to {row.region} and is on its way to a worker.")
    # As it was just now; the load may be half a second old.
    load = load.with_busy(standing.running, standing.running_beside)
    ahead = held_before + standing.before + round(load.share_beside * standing.before_beside)
    return Place(ahead + 1, routing.estimated_wait_s(ahead, load), _why_busy(row, load, ahead))


def held_place(row: JobRow, links: Mapping[str, Link], own: int, held: int) -> Place:
    """The same of a job that is held until it is its key's turn.

    own: held jobs of its key before it; held: about how many of all keys.
    """
    link = links.get(row.region)
    try:
        if link is None or row.held_for is None:
            raise Down
        load = link.load(row.type, row.model)
        ahead = held + link.mailbox.ahead[row.priority].get().get(row.held_for, 0)
        if load.slots == 0:
            return Place(ahead + 1, None, _why_nobody(row, link.cards(), links))
    except Down:
        return Place(reason=_why_unreachable(row))
    before = "1 job of its key is" if own == 1 else f"{own} jobs of its key are"
    reason = f"It is held until it is its key's turn, as keys take turns by weight; {before} held before it."
    return Place(ahead + 1, routing.estimated_wait_s(ahead, load), reason)


def statistics(links: Mapping[str, Link], rows: Rows, held: Mapping[str, int] = MappingProxyType({})) -> Statistics:
    """Queues and workers of these regions, at a cost that does not depend on the depth.

    held: jobs that are in no store yet because it is not their key's turn, by queue.
    A region whose store cannot be reached counts what the rows say, which costs as much as it has live jobs. Raises
    Down if none can be reached.
    """
    by_type: Counter[JobType] = Counter(dict.fromkeys(JobType, 0))
    by_region: dict[str, RegionStatistics] = {}
    waits: list[float] = []
    oldest = rows.census.oldest_waits(links)
    down: Down | None = None
    for name, link in links.items():
        depths: Counter[JobType] = Counter()
        try:
            running = workers = 0
            for queue, queued in link.queues().items():
                depths[routing.split_queue(queue)[1]] += queued.depth
                running += queued.running
            for queue, count in held.items():
                region, job_type = routing.split_queue(queue)
                depths[job_type] += count if region == name else 0
            workers = sum(card.state is WorkerState.READY for card in link.cards())
            for job_type in JobType:
                wait_s = routing.estimated_wait_s(depths[job_type], link.load(job_type))
                waits += [] if wait_s is None else [wait_s]
            reachable = True
        except Down as error:
            down, reachable, workers = error, False, 0
            live = rows.census.live(name)
            depths = Counter({job_type: live.get((job_type, JobState.QUEUED), 0) for job_type in JobType})
            running = sum(count for (_, state), count in live.items() if state is JobState.RUNNING)
        by_type += depths
        oldest_s = max((wait_s for (region, _), wait_s in oldest.items() if region == name), default=None)
        by_region[name] = RegionStatistics(depths.total(), running, workers, oldest_s, reachable)
    if down is not None and not any(region.reachable for region in by_region.values()):
        raise down
    return Statistics(
        total_queued=by_type.total(),
        running=sum(region.running for region in by_region.values()),
        available_workers=sum(region.available_workers for region in by_region.values()),
        estimated_wait_s=max(waits, default=None),
        oldest_wait_s=max(oldest.values(), default=None),
        by_type={job_type: by_type[job_type] for job_type in JobType},
        by_region=by_region,
    )


def _why_unreachable(row: JobRow) -> str:
    what = f"Region {row.region} cannot be reached"
    if not row.allow_cross_region:
        return f"{what}, and the job may not leave it; it is sent when the region is back."
    return f"{what}; the job is sent when it is back, or moves to another region that serves {_what(row)}."


def _why_nobody(row: JobRow, cards: list[Card], links: Mapping[str, Link]) -> str:
    states = Counter(
        _NOT_TAKING[card.state]
        for card in cards
        if card.state in _NOT_TAKING and row.type in card.slots and row.model in (None, card.models.get(row.type))
    )
    if states:
        who = ", ".join(f"{count} {word}" for word, count in sorted(states.items()))
        lack, nobody = (
            f"The workers for {_what(row)} in {row.region} take no new jobs now ({who})",
            "and no other region has any",
        )
    else:
        lack = f"No live worker serves {_what(row)} in {row.region}"
        nobody = "nor in any other region"
    if not row.allow_cross_region:
        return f"{lack}, and it may not leave the region."
    to = nearest(links, row.region, lambda link: link.load(row.type, row.model).slots > 0)
    return f"{lack}, {nobody}." if to is None else f"{lack}; it moves to {to} within seconds."


def _why_busy(row: JobRow, load: Load, ahead: int) -> str:
    before = "1 job is before it" if ahead == 1 else f"{ahead} jobs are before it"
    if load.free == 0:
        return f"All {load.slots} slots for {_what(row)} in {row.region} are busy; {before}."
    return f"A worker with a free slot takes it next; {before}."


def _what(row: JobRow) -> str:
    return row.type if row.model is None else f"{row.type} with {row.model}"
