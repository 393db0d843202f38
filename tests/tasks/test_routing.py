"""Queue names, priorities and the choice of a region: pure functions."""

import pytest

from engines.catalogue import JobType
from tasks import routing
from tasks.routing import Load, Offer
from tasks.settings import SettingsError, load_regions, load_worker

REGIONS = load_regions({})
SERVES = Load(slots=4, free=4, service_s=1.0)
EMPTY = Load(slots=0, free=0, service_s=None)


def decide(wanted, cross_region=True, **offers):
    by_name = {
        name.replace("_", "-"): offer if isinstance(offer, Offer) else Offer(offer, ahead=0)
        for name, offer in offers.items()
    }
    return routing.choose_region(wanted, REGIONS, by_name, cross_region=cross_region, what="llm")


def choose(wanted, cross_region=True, **offers):
    return decide(wanted, cross_region, **offers).region


def waits(seconds):
    """What a region offers where a new job waits this long, for its only slot."""
    return Offer(Load(slots=1, free=0, service_s=1.0, residuals_s=[seconds]), ahead=0)


def test_a_queue_is_named_for_its_region_and_type_and_read_back():
    for job_type in JobType:
        for pinned in (False, True):
            name = routing.queue_name("asia-east", job_type, pinned=pinned)
            assert routing.split_queue(name) == ("asia-east", job_type)
    with pytest.raises(ValueError, match="celery"):
        routing.split_queue("celery.celery")


@pytest.mark.parametrize(
    ("broker", "expected"), [("redis://h/0", 0), ("rediss://h/0", 0), ("amqp://h//", 9), ("pyamqp://h//", 9)]
)
def test_the_most_urgent_priority_is_first_on_every_broker(broker, expected):
    assert routing.broker_priority(9, broker) == expected


def test_a_job_stays_where_it_was_wanted_while_that_region_serves():
    assert choose("asia-south", asia_south=SERVES, asia_east=SERVES) == "asia-south"


def test_a_job_goes_to_the_nearest_region_that_serves():
    assert choose("asia-south", asia_south=EMPTY, europe_west=SERVES, asia_east=SERVES) == "asia-east"
    assert choose("europe-west", asia_east=SERVES, america_north=SERVES) == "america-north"


def test_a_pinned_job_never_leaves_and_one_that_nobody_serves_waits_at_home():
    assert choose("asia-south", cross_region=False, asia_south=EMPTY, asia_east=SERVES) == "asia-south"
    assert choose("asia-south", asia_south=EMPTY, asia_east=EMPTY) == "asia-south"


def test_a_pinned_job_stays_whatever_its_region_is_like():
    far = {"asia_south": SERVES, "europe_west": SERVES}
    lost, unreachable = decide("asia-east", False, asia_east=EMPTY, **far), decide("asia-east", False, **far)

    assert {lost.region, unreachable.region, choose("asia-east", False, asia_east=waits(900), **far)} == {"asia-east"}
    assert lost.reason == "It may not leave asia-east. No live worker serves llm in asia-east."
    assert unreachable.reason == "It may not leave asia-east. asia-east cannot be reached."
    assert (lost.estimated_wait_s, unreachable.estimated_wait_s) == (None, None)


def test_a_region_that_cannot_be_reached_is_left_for_the_nearest_that_serves():
    decision = decide("asia-south", europe_west=SERVES, asia_east=SERVES, america_north=SERVES)

    assert (decision.region, decision.estimated_wait_s) == ("asia-east", 0)
    assert decision.reason == "asia-south cannot be reached. asia-east, 3805 km away, is the nearest that can."


@pytest.mark.parametrize(
    ("here", "there", "region"),
    [
        (waits(60.5), waits(2.5), "europe-west"),
        (waits(60.5), SERVES, "europe-west"),
        # A tenth less is within what estimates are wrong by.
        (waits(60.5), waits(54.5), "asia-east"),
        # So is a second, whatever share of the wait it is.
        (waits(1.5), SERVES, "asia-east"),
        (waits(2.5), waits(60.5), "asia-east"),
        # Nothing is known of one of them: no reason to go.
        (Load(slots=1, free=0, service_s=None), waits(0.5), "asia-east"),
        (waits(60.5), Load(slots=9, free=0, service_s=None), "asia-east"),
    ],
)
def test_a_job_goes_farther_only_for_a_wait_that_is_known_to_be_much_shorter(here, there, region):
    assert choose("asia-east", asia_east=here, europe_west=there) == region


def test_the_distance_is_part_of_the_wait():
    margin = routing.LEAST_SAVED_S
    way_s = routing.distance_km(REGIONS["asia-east"], REGIONS["america-north"]) * routing.SECONDS_PER_KM
    for saved_s, region in ((margin + way_s - 0.01, "asia-east"), (margin + way_s + 0.01, "america-north")):
        assert choose("asia-east", asia_east=waits(saved_s), america_north=SERVES) == region


def test_among_regions_that_can_serve_a_slow_near_one_is_passed_over():
    crowded = decide("asia-east", asia_east=EMPTY, asia_south=waits(60.5), europe_west=SERVES)
    near = decide("asia-east", asia_east=EMPTY, asia_south=waits(2.5), europe_west=waits(1.5))

    assert crowded.region == "europe-west"
    assert "is the soonest that can" in crowded.reason
    assert near.region == "asia-south"


def test_a_decision_says_why_and_how_long():
    stays = decide("asia-east", asia_east=waits(1.5), asia_south=SERVES)
    goes = decide("asia-east", asia_east=waits(60.5), asia_south=waits(2.5))
    nowhere = decide("asia-east", asia_east=EMPTY, asia_south=EMPTY)

    assert decide("asia-east", asia_east=SERVES).reason == "asia-east has a free slot for llm."
    assert stays.reason.endswith("no other region is so much sooner that it pays to leave.")
    assert goes.reason == "It would wait about 61 s in asia-east and 3 s in asia-south, 3805 km away."
    assert nowhere.reason.endswith("Nor does another region; it waits in asia-east.")
    assert (stays.estimated_wait_s, goes.estimated_wait_s, nowhere.estimated_wait_s) == (1.5, 2.5, None)


def test_a_region_with_a_free_slot_is_decided_without_the_others():
    assert routing.serves_at_once(Offer(Load(slots=2, free=1, service_s=None), ahead=0))
    assert not routing.serves_at_once(Offer(Load(slots=2, free=1, service_s=1.0), ahead=1))
    assert not routing.serves_at_once(Offer(EMPTY, ahead=0))


def test_distance_is_that_of_the_globe():
    shanghai_frankfurt = routing.distance_km(REGIONS["asia-east"], REGIONS["europe-west"])
    assert shanghai_frankfurt == pytest.approx(8830, rel=0.01)


@pytest.mark.parametrize(
    ("ahead", "load", "expected"),
    [
        (0, SERVES, 0),
        (3, SERVES, 0),
        # Jobs that are not known of have just begun.
        (0, Load(slots=4, free=0, service_s=2.0), 2.0),
        (4, Load(slots=4, free=0, service_s=2.0), 4.0),
        (0, Load(slots=4, free=0, service_s=None), None),
        (0, EMPTY, None),
    ],
)
def test_the_estimated_wait_is_nothing_with_a_free_slot_and_unknown_without_evidence(ahead, load, expected):
    assert routing.estimated_wait_s(ahead, load) == expected


def test_regions_are_the_seeds_four_on_one_broker_unless_told_otherwise():
    assert list(REGIONS) == ["asia-east", "asia-south", "europe-west", "america-north"]
    assert {region.broker for region in REGIONS.values()} == {"redis://127.0.0.1:6390/0"}

    own = load_regions({"GPU_STORE_URL": "redis://s/1", "REGIONS": '{"mars": {"broker": "amqp://m//"}}'})

    assert (own["mars"].broker, own["mars"].store) == ("amqp://m//", "redis://s/1")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"mars": 1}', '{"mars": {"brokr": "x"}}'])
def test_regions_that_cannot_be_read_are_refused(text):
    with pytest.raises(SettingsError, match="REGIONS"):
        load_regions({"REGIONS": text})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPU_MAX_CONCURRENT_JOBS", "0"),
        ("GPU_MAX_CONCURRENT_JOBS", "1.5"),
        ("GPU_DEVICE_ID", "-1"),
        ("GPU_MAX_MEMORY_GB", "lots"),
        ("GPU_MAX_MEMORY_GB", "nan"),
        ("GPU_ENABLE_CPU_OFFLOAD", "maybe"),
    ],
)
def test_a_worker_setting_that_cannot_be_used_is_named(name, value):
    with pytest.raises(SettingsError, match=name):
        load_worker({name: value})


def test_worker_settings_that_are_empty_or_null_count_as_left_out():
    worker = load_worker({"GPU_MAX_MEMORY_GB": "null", "GPU_DEVICE_ID": "", "GPU_LLM_MODEL": "echo", "GPU_DTYPE": ""})

    assert (worker.max_memory_gib, worker.device_id, worker.dtype) == (None, None, "auto")
    assert worker.models == {JobType.LLM: "echo"}
    assert (worker.offload, worker.max_concurrent_jobs, worker.drain_grace_s) == (True, None, 30.0)
