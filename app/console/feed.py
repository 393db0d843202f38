"""What the console shows of this moment: worked out at most once a second, however many people look on.

Nothing runs while nobody looks: whoever finds the picture old draws the next one, and the others take it from there.
A picture is made of sections; a listener is sent those that changed.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app import workers
from app.dispatch import Dispatch, Unavailable
from app.links import Down
from app.streams import Event
from engines.catalogue import JobType
from tasks import routing
from tasks.fleet import WorkerState

logger = logging.getLogger(__name__)

#: A picture that is older than this is drawn anew.
FRESH_S = 1.0

#: Sections by name.
Picture = dict[str, Any]


class Feed:
    """The platform as it is now. Threads share it."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._drawing = threading.Lock()
        self._picture: Picture = {}
        self._drawn_at = float("-inf")

    def picture(self) -> Picture:
        """totals, regions, queues, workers and pulse, at most FRESH_S old. Raises what the database does."""
        with self._drawing:
            if time.monotonic() - self._drawn_at >= FRESH_S:
                self._picture = self._draw()
                self._drawn_at = time.monotonic()
            return self._picture

    def follow(self, stopping: threading.Event, *, everything: bool) -> Iterator[Event | None]:
        """A snapshot, then a change whenever there is one, until stopping; None after a look that found none.

        Each has `at`, unix seconds by this host's clock. everything: each worker, which only admins may see; without it
        their numbers.
        """
        shown: Picture = {}
        while not stopping.is_set():
            try:
                picture = self.picture()
            except SQLAlchemyError as error:
                logger.warning("the console shows nothing new: %s", type(error).__name__)
                picture = shown
            if not everything and picture:
                picture = {**picture, "workers": {**picture["workers"], "items": None}}
            changed = {name: section for name, section in picture.items() if shown.get(name) != section}
            if changed:
                yield Event("now", "change" if shown else "snapshot", {"at": time.time(), **changed})
            else:
                yield None
            shown = picture
            stopping.wait(FRESH_S)

    def _draw(self) -> Picture:
        dispatch = self._dispatch
        at = time.time()
        #: Moments, not lengths: what only grows older is no change.
        oldest = {
            queue: round(at - wait_s, 1) for queue, wait_s in dispatch.rows.census.oldest_waits(dispatch.links).items()
        }
        queues: list[dict[str, Any]] = []
        regions: list[dict[str, Any]] = []
        for name, link in dispatch.links.items():
            depths: Counter[JobType] = Counter()
            running: Counter[JobType] = Counter()
            slots = used = ready = 0
            try:
                for queue, queued in link.queues().items():
                    job_type = routing.split_queue(queue)[1]
                    depths[job_type] += queued.depth
                    running[job_type] += queued.running
                for card in link.cards():
                    if card.state is WorkerState.READY:
                        ready += 1
                        slots += sum(card.slots.values())
                        used += sum(card.busy.values())
                reachable = True
            except Down:
                reachable = False
            queues += [
                {
                    "region": name,
                    "type": job_type,
                    "queued": depths[job_type],
                    "running": running[job_type],
                    "oldest_at": oldest.get((name, job_type)),
                }
                for job_type in JobType
                if depths[job_type] or running[job_type] or (name, job_type) in oldest
            ]
            regions.append(
                {
                    "name": name,
                    "latitude": link.region.latitude,
                    "longitude": link.region.longitude,
                    "reachable": reachable,
                    "queued": depths.total(),
                    "running": running.total(),
                    "workers": ready,
                    "slots": slots,
                    "used": used,
                }
            )
        return {
            "totals": {
                **{
                    figure: sum(region[figure] for region in regions)
                    for figure in ("queued", "running", "workers", "slots", "used")
                },
                "oldest_at": min(oldest.values(), default=None),
            },
            "regions": regions,
            "queues": queues,
            "workers": _workers(dispatch),
            "pulse": dispatch.rows.census.pulse(),
        }


def _workers(dispatch: Dispatch) -> Mapping[str, Any]:
    try:
        items = workers.everyone(dispatch.links)
    except Unavailable:
        items = []
    for item in items:
        # It changes with every beat.
        del item["last_beat"]
    return {"by_state": Counter(item["state"] for item in items), "items": items}
