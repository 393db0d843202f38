"""Keys take turns by weight within one priority of a queue, and what is held for its turn is a job like any other."""

import time
from collections.abc import Callable

import pytest

from app.job_table import JobRow
from app.keys import Keys, Scope
from app.tables import open_database
from app.turns import Turns, window
from engines.catalogue import JobType
from tasks.job import JobState
from tasks.routing import Load
from tests.conftest import Valkey
from tests.rig import Platform

WINDOW = 8
QUEUE = "asia-east.llm"


@pytest.fixture
def platform(make_platform: Callable[..., Platform]) -> Platform:
    """One that sends few jobs ahead."""
    return make_platform(FAIR_WINDOW=str(WINDOW))


@pytest.fixture
def keys(platform: Platform) -> Keys:
    """Its keys."""
    return Keys(open_database(platform.database_url))


def owner_of(keys: Keys, weight: int) -> str:
    """The owner of a new key of that weight."""
    return keys.create("test", [Scope.INFER], weight=weight)[4:12]


def held(platform: Platform) -> int:
    return sum(platform.dispatch.rows.held.counts().values())


def flood(platform: Platform, owner: str, count: int, **request: object) -> list[JobRow]:
    """So many quick jobs of one owner."""
    return [platform.submit(f"{owner} {number}", owner=owner, **request) for number in range(count)]  # type: ignore[arg-type]


def in_order_of_start(platform: Platform, rows: list[JobRow]) -> list[JobRow]:
    """The jobs once all have completed, by when they started."""
    ended = [platform.ended(row, 40) for row in rows]
    assert {row.status for row in ended} == {JobState.COMPLETED}
    return sorted(ended, key=lambda row: row.started_at or 0)


def test_one_keys_flood_holds_up_anothers_job_by_a_window_and_weights_share_what_is_behind_it(platform, keys):
    heavy, light = owner_of(keys, 3), owner_of(keys, 1)
    flood_of_a = flood(platform, "a", 100)
    one_of_b = platform.submit("b", owner="b")
    shared = flood(platform, heavy, 32) + flood(platform, light, 32)
    urgent = platform.submit("urgent", owner="a", priority=5)
    assert platform.row(one_of_b).held_for == QUEUE
    assert urgent.held_for is None

    platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    started = in_order_of_start(platform, [*flood_of_a, one_of_b, *shared, urgent])

    names = [row.id for row in started]
    # Those that were sent before, one round of turns, and what the worker's speed lets in beside.
    assert names.index(one_of_b.id) <= 2 * WINDOW + 40
    assert names.index(urgent.id) <= 2
    owners = [row.owner for row in started]
    both = [owner for owner in owners if owner in (heavy, light)]
    first = both[:32]
    assert 21 <= first.count(heavy) <= 27
    # Each key's own in the order in which they came.
    assert [row.id for row in started if row.owner == light] == [row.id for row in shared[32:]]


def test_control_looks_again_soon_though_sending_took_long(platform, keys, monkeypatch):
    """Or workers would have begun all the urgent jobs that were sent ahead, and go on to others."""
    platform.stop_control()
    flood(platform, "a", WINDOW + 100)
    send = platform.dispatch.send

    def send_slowly(row: JobRow) -> None:
        time.sleep(0.01)
        send(row)

    monkeypatch.setattr(platform.dispatch, "send", send_slowly)
    turns = Turns(platform.dispatch, keys, WINDOW + 100)
    began = time.monotonic()
    assert turns.release() == 100

    assert time.monotonic() - began > 1
    assert turns.pause_s < 0.5


def test_a_held_job_says_so_is_cancelled_and_expires(platform):
    sent = flood(platform, "a", WINDOW)
    rows = [*flood(platform, "a", 3), platform.submit("late", owner="a", queue_timeout_seconds=0.3)]
    assert [row.held_for for row in [*sent, *rows]] == [None] * WINDOW + [QUEUE] * 4

    place = platform.dispatch.placement.place(platform.row(rows[2]))
    assert place.position == WINDOW + 3
    last = platform.row(rows[3])
    assert platform.dispatch.placement.place(last, newest=True) == platform.dispatch.placement.place(last)
    assert platform.dispatch.statistics("asia-east").total_queued == WINDOW + 4
    assert platform.dispatch.cancel(rows[0]).status is JobState.CANCELLED
    platform.until(lambda: platform.status(rows[3]) is JobState.TIMEOUT)
    assert platform.row(rows[3]).error_code == "queue_timeout"
    assert platform.dispatch.placement.place(platform.row(rows[2])).position == WINDOW + 2
    assert held(platform) == 2


def test_a_job_that_was_sent_stands_behind_more_urgent_ones_that_are_held(platform):
    low = flood(platform, "a", WINDOW)
    urgent = flood(platform, "a", WINDOW + 12, priority=5)
    assert (platform.row(low[0]).held_for, platform.row(urgent[-1]).held_for) == (None, QUEUE)

    place = platform.dispatch.placement.place(platform.row(low[0]))

    assert place.position == WINDOW + 12 + 1


def test_what_is_held_is_not_sent_by_whoever_mends_and_survives_an_emptied_store(platform, valkey: Valkey):
    rows = flood(platform, "a", WINDOW + 20)
    assert held(platform) == 20
    assert platform.dispatch.rows.census.unsent("asia-east", 1000) <= WINDOW

    valkey.flush()
    ledger = platform.dispatch.links["asia-east"].mailbox.ledger
    # As much as the window takes, entered anew or released.
    platform.until(lambda: ledger.waiting(QUEUE, 0) >= WINDOW)
    platform.until(lambda: held(platform) >= 20 - WINDOW, 1)
    platform.start_worker()

    assert {platform.ended(row, 40).status for row in rows} == {JobState.COMPLETED}
    assert held(platform) == 0


def test_held_jobs_move_with_their_region_and_stay_held(platform):
    platform.stop_control()
    flood(platform, "a", WINDOW + 5)
    to = next(name for name in platform.dispatch.links if name != "asia-east")

    moved = platform.dispatch.rows.move("asia-east", JobType.LLM, None, to=to, limit=100)

    assert sorted(row.held_for or "" for row in moved) == [""] * WINDOW + [f"{to}.llm"] * 5
    platform.start_control()
    platform.until(lambda: platform.dispatch.links[to].mailbox.ledger.waiting(f"{to}.llm", 0) >= WINDOW)
    assert held(platform) <= 5


def test_without_turns_all_is_sent_and_what_was_held_before_is_released(platform, keys):
    flood(platform, "a", WINDOW + 5)
    assert held(platform) == 5

    assert Turns(platform.dispatch, keys, 0).release() == 5
    assert held(platform) == 0


@pytest.mark.parametrize(
    ("load", "most"),
    [
        (Load(0, 0, None), 64),
        (Load(1, 0, 0.001), 64),
        (Load(32, 0, 20.0), 128),
        (Load(32, 0, 0.01), 533),
    ],
)
def test_the_window_grows_with_the_slots_and_with_their_speed(load, most):
    assert window(64, load) == most
