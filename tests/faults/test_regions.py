"""Three regions, each with a broker and a store of its own, RabbitMQ and Valkey mixed: a fault in one stays there."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import reroute
from app.job_table import JobRow
from tasks.job import JobState
from tests.faults.world import AMERICA, ANSWER_S, EUROPE, REGIONS, UNHURT_S, Traffic, World, opened
from tests.rig import BUSY_S

#: How long a fault lasts.
FAULT_S = 2.0


@pytest.fixture(scope="module")
def lasting_world(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for all tests; they ask for `world`."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(migrated, folder / "jobs.db")
    with opened(f"sqlite:///{folder / 'jobs.db'}", folder) as made:
        yield made


@pytest.fixture
def world(lasting_world: World) -> World:
    """Three regions in which everything works."""
    lasting_world.mend()
    return lasting_world


def check(world: World, traffic: Traffic, hurt: str) -> list[JobRow]:
    """Nothing was lost, pinned jobs stayed, and the other regions never noticed; all jobs, as they ended."""
    ended = {region: world.ended(rows) for region, rows in traffic.rows.items()}
    everything = [row for rows in ended.values() for row in rows]

    assert {row.status for row in everything} == {JobState.COMPLETED}
    pinned = [row for row in everything if not row.allow_cross_region]
    assert [row for row in pinned if row.region != row.region_wanted] == []
    assert world.traces(pinned) == []
    assert traffic.slowest_s[hurt] < 2 * ANSWER_S + BUSY_S
    for region in set(REGIONS) - {hurt}:
        assert traffic.slowest_s[region] < ANSWER_S + BUSY_S
        assert {row.region for row in ended[region]} == {region}
        assert max(row.completed_at - row.created_at for row in ended[region]) < UNHURT_S + BUSY_S
    return everything


def begin(world: World, seconds: float, *, pinned: bool = True) -> JobRow:
    """A job that runs in europe-west now, and for so long."""
    row = world.platform.submit(f"sleep {seconds}", region=EUROPE, allow_cross_region=not pinned)
    world.platform.until(lambda: world.platform.status(row) is JobState.RUNNING)
    return row


def test_jobs_run_at_home_on_brokers_of_both_kinds_and_pinned_ones_leave_no_trace_elsewhere(world: World):
    sent = {
        (region, free): [world.platform.submit("home", region=region, allow_cross_region=free) for _ in range(5)]
        for region in REGIONS
        for free in (True, False)
    }
    ended = {key: world.ended(rows, 15) for key, rows in sent.items()}

    for (region, _), rows in ended.items():
        assert {(row.status, row.region, row.worker_id) for row in rows} == {
            (JobState.COMPLETED, region, world.workers[region].id)
        }
        # The recordings do hear what goes on where it should.
        world.platform.until(lambda rows=rows, region=region: all_heard(world, region, rows))
    everything = [row for rows in ended.values() for row in rows]
    assert world.traces(everything) == []
    world.ran_once(everything)


def all_heard(world: World, region: str, rows: list[JobRow]) -> bool:
    return all(row.id in record for row in rows for record in world.records[region])


@pytest.mark.parametrize("part", ["broker", "store", "frozen store"])
def test_a_region_whose_server_goes_away_loses_nothing_and_hurts_no_other(world: World, part: str):
    store, rabbitmq = world.stores[EUROPE], world.rabbitmq
    go, come_back = {
        "broker": (rabbitmq.kill, rabbitmq.start),
        "store": (store.kill, store.start),
        "frozen store": (store.stop, store.cont),
    }[part]
    running = begin(world, FAULT_S + 1)

    with Traffic(world.platform) as traffic:
        time.sleep(0.5)
        before = list(traffic.rows[EUROPE])
        go()
        time.sleep(FAULT_S)
        come_back()
        time.sleep(0.5)

    traffic.rows[EUROPE].append(running)
    everything = check(world, traffic, EUROPE)
    # An outcome that is lost with its store before anybody fetched it has to be made again.
    world.ran_once(everything, may_run_again=before if part == "store" else [])


def test_a_region_whose_link_is_cut_works_on_and_only_what_may_leave_it_is_run_elsewhere(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reroute, "UNREACHABLE_S", 1.0)
    monkeypatch.setattr(reroute, "UNREACHABLE_RUNNING_S", 2.0)
    link = world.link(EUROPE)
    pinned, free = begin(world, 1.5), begin(world, 4, pinned=False)

    with Traffic(world.platform) as traffic:
        time.sleep(0.5)
        before = list(traffic.rows[EUROPE])
        link.cut()
        held = world.platform.submit("held", region=EUROPE, allow_cross_region=False)
        # The pinned one ends there while nobody can see it; the other is begun again where it can be reached.
        world.platform.until(lambda: world.completions()[pinned.id] == 1)
        world.platform.until(lambda: world.platform.row(free).region != EUROPE, 15)
        elsewhere = world.platform.submit("anywhere", region=EUROPE)
        world.platform.ended(elsewhere)
        assert world.platform.status(pinned) is JobState.RUNNING
        assert world.platform.status(held) is JobState.QUEUED
        assert "cannot be reached" in str(world.platform.dispatch.placement.place(world.platform.row(held)).reason)
        link.heal()
        time.sleep(0.5)

    traffic.rows[EUROPE] += [pinned, held, free, elsewhere]
    everything = check(world, traffic, EUROPE)
    # The one case in which a job runs twice, with one outcome: what a region held that can be reached no more.
    world.ran_once(everything, may_run_again=[row for row in (*before, free) if row.allow_cross_region])


def test_a_region_behind_a_wire_that_carries_nothing_gets_everything_once_when_it_is_mended(world: World):
    with Traffic(world.platform) as traffic:
        for spoil in (world.wire.black_hole, world.wire.half_open, world.wire.refuse):
            time.sleep(0.5)
            spoil()
            time.sleep(FAULT_S)
            world.wire.heal()

    world.ran_once(check(world, traffic, AMERICA))


def test_a_slow_wire_that_is_cut_again_and_again_costs_time_and_no_job(world: World):
    world.wire.delay(0.04)

    with Traffic(world.platform) as traffic:
        for _ in range(8):
            time.sleep(0.2)
            world.wire.cut()

    world.ran_once(check(world, traffic, AMERICA))
