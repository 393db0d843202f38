"""Queue names, priorities and the choice of a region: pure functions."""

import pytest

from engines.catalogue import JobType
from tasks import routing
from tasks.routing import Load
from tasks.settings import SettingsError, load_regions, load_worker

REGIONS = load_regions({})
SERVES = Load(slots=4, free=4, service_s=1.0)
EMPTY = Load(slots=0, free=0, service_s=None)


def choose(wanted, cross_region=True, **loads):
    by_name = {name.replace("_", "-"): load for name, load in loads.items()}
    return routing.choose_region(wanted, REGIONS, by_name, cross_region=cross_region)


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


def test_distance_is_that_of_the_globe():
    shanghai_frankfurt = routing.distance_km(REGIONS["asia-east"], REGIONS["europe-west"])
    assert shanghai_frankfurt == pytest.approx(8830, rel=0.01)


@pytest.mark.parametrize(
    ("ahead", "load", "expected"),
    [
        (0, SERVES, 0),
        (3, SERVES, 0),
        (4, Load(slots=4, free=0, service_s=2.0), 3.0),
        (0, Load(slots=4, free=0, service_s=2.0), 1.0),
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
