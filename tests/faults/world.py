"""Three regions on one machine, each with servers and a worker of its own, and clients who go on submitting.

    asia-east       Valkey as broker and store
    europe-west     RabbitMQ as broker, Valkey as store
    america-north   Valkey as broker and store, which the API reaches over a wire that can be spoiled (proxy.py)

Each region is a network namespace with an address of its own (tests/chaos/regions.py). Where those cannot be made, all
are on 127.0.0.1, and tests that take a link down are skipped.
"""

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from app.job_table import JobRow
from tasks.job import JobState
from tests.chaos import regions
from tests.chaos.regions import NoNamespaces, Site
from tests.conftest import Valkey
from tests.faults.proxy import Proxy
from tests.faults.record import RabbitMqRecord, Record, ValkeyRecord
from tests.rig import READY_S, Platform, Worker, free_port, until
from tests.servers import RabbitMq

ASIA, EUROPE, AMERICA = REGIONS = ("asia-east", "europe-west", "america-north")
#: No submit to a region that is well takes longer, whatever is broken elsewhere; to a broken one, twice that.
ANSWER_S = 1.5
#: A job of a region that is well ends within this, whatever is broken elsewhere.
UNHURT_S = 5.0
#: A job whose region was broken ends this long after it is well again.
MENDED_S = 30.0

_RAN = re.compile(r"job (\S+) attempt \d+: (\w+) after")


@dataclass
class World:
    """Everything of three regions."""

    platform: Platform
    stores: Mapping[str, Valkey]
    rabbitmq: RabbitMq
    #: Between the API and america-north.
    wire: Proxy
    workers: Mapping[str, Worker]
    #: What each region's servers hear.
    records: Mapping[str, list[Record]]
    sites: Mapping[str, Site]
    #: Why there are no namespaces, if there are none.
    why_not: str

    def link(self, region: str) -> Site:
        """The region's link; skips the test where it has none."""
        if not self.sites:
            pytest.skip(self.why_not)
        return self.sites[region]

    def completions(self) -> Counter[str]:
        """How often each job was completed, by all workers together."""
        found = (_RAN.finditer(worker.log.read_text()) for worker in self.workers.values())
        return Counter(match[1] for matches in found for match in matches if match[2] == JobState.COMPLETED)

    def ended(self, rows: list[JobRow], seconds: float = MENDED_S) -> list[JobRow]:
        """The jobs once all have ended; nobody asks for them meanwhile, so it is the reconciler that finds out."""
        ids = [row.id for row in rows]
        until(lambda: all(row.ended for row in self.platform.dispatch.rows.get_all(ids).values()), seconds)
        found = self.platform.dispatch.rows.get_all(ids)
        return [found[job_id] for job_id in ids]

    def ran_once(self, rows: list[JobRow], *, may_run_again: Iterable[JobRow] = ()) -> None:
        """Fails unless every job was completed once by all workers together."""
        again = {row.id for row in may_run_again}
        # An outcome is handed in just before its line is written.
        until(lambda: {row.id for row in rows} <= self.completions().keys())
        done = self.completions()
        assert [
            (row.id, row.region_wanted, done[row.id]) for row in rows if done[row.id] > 1 and row.id not in again
        ] == []

    def traces(self, rows: list[JobRow]) -> list[tuple[str, str]]:
        """(region, job id) of those that servers of another region than their own ever heard of."""
        return [
            (region, row.id)
            for row in rows
            for region, records in self.records.items()
            if region != row.region and any(row.id in record for record in records)
        ]

    def mend(self) -> None:
        """Everything works again, whatever the test before did to it."""
        self.wire.heal()
        for site in self.sites.values():
            site.heal()
        for store in self.stores.values():
            store.cont()
            store.start()
        self.rabbitmq.thaw()
        self.rabbitmq.start()
        links = self.platform.dispatch.links
        until(lambda: set(self.platform.dispatch.check().values()) == {None}, MENDED_S)
        until(lambda: all(link.cards() for link in links.values()), MENDED_S)


@contextmanager
def opened(database_url: str, folder: Path) -> Iterator[World]:
    """A world with a worker that serves in each region."""
    with ExitStack() as stack:
        sites: dict[str, Site] = {}
        why_not = ""
        try:
            sites = {site.region: site for site in regions.build(REGIONS)}
            stack.callback(regions.remove)
        except NoNamespaces as error:
            why_not = str(error)
        host = {region: sites[region].address if sites else "127.0.0.1" for region in REGIONS}
        inside = {region: sites[region].inside if sites else [] for region in REGIONS}

        rabbitmq = RabbitMq(host[EUROPE], inside[EUROPE])
        stack.callback(rabbitmq.stop)
        stores = {}
        for region in REGIONS:
            stores[region] = Valkey(free_port(), folder, host[region], inside[region])
            stack.callback(stores[region].kill)
            stores[region].start()
        wire = stack.enter_context(Proxy(stores[AMERICA].host, stores[AMERICA].port))

        # As the region's own workers reach them, who know of no other region.
        at_home = {region: {"broker": f"{store.url}/0", "store": f"{store.url}/1"} for region, store in stores.items()}
        at_home[EUROPE]["broker"] = rabbitmq.url
        far = f"redis://127.0.0.1:{wire.port}"
        from_here = {**at_home, AMERICA: {"broker": f"{far}/0", "store": f"{far}/1"}}
        # Addresses of namespaces are none of this machine's own.
        environ = {**os.environ, "DATABASE_URL": database_url, "GPU_LLM_MODEL": "echo", "GPU_ALLOW_PLAINTEXT": "1"}
        platform = Platform({**environ, "REGIONS": json.dumps(from_here)}, folder)
        stack.callback(platform.close)
        rabbitmq.start()
        workers = {
            region: platform.start_worker(
                queues=f"{region}.llm",
                wait=False,
                inside=inside[region],
                GPU_REGION=region,
                REGIONS=json.dumps({region: at_home[region]}),
            )
            for region in REGIONS
        }
        records: dict[str, list[Record]] = {region: [ValkeyRecord(store)] for region, store in stores.items()}
        records[EUROPE].append(RabbitMqRecord(rabbitmq))
        for record in (record for of_region in records.values() for record in of_region):
            stack.enter_context(record)
        for worker in workers.values():
            until(lambda worker=worker: worker.id is not None or worker.process.poll() is not None, READY_S)
            assert worker.id is not None, worker.log.read_text()
        platform.start_control()
        yield World(platform, stores, rabbitmq, wire, workers, records, sites, why_not)


@dataclass
class Traffic:
    """A client in each region who goes on submitting short jobs for as long as the block runs, every other one pinned.

    Everything that was submitted is in `rows`, by the region that was wanted.
    """

    platform: Platform
    every_s: float = 0.1
    rows: dict[str, list[JobRow]] = field(default_factory=dict)
    #: Seconds that the slowest submit took, by region.
    slowest_s: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit, args=(region,)) for region in REGIONS]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _submit(self, region: str) -> None:
        rows = self.rows.setdefault(region, [])
        while not self._stop.wait(self.every_s):
            began = time.monotonic()
            pinned = len(rows) % 2 == 1
            rows.append(self.platform.submit(f"number {len(rows)}", region=region, allow_cross_region=not pinned))
            self.slowest_s[region] = max(self.slowest_s.get(region, 0.0), time.monotonic() - began)
