"""Real workers that take jobs by their duty: each type its slots, in turn, at their hours, for their share."""

import time
from datetime import UTC, datetime, timedelta

import kombu

from engines.catalogue import JobType
from tasks.fleet import WorkerState
from tasks.job import Job, JobState

BOTH = "asia-east.llm,asia-east.embedding"
QUEUE = "asia-east.llm"
ECHO = {"GPU_LLM_MODEL": "echo", "GPU_EMBEDDING_MODEL": "echo"}


def depth(platform):
    """Messages that nobody has taken."""
    return platform.dispatch.links["asia-east"].broker.publisher.depths([QUEUE])[QUEUE]


def order(platform, worker, rows):
    """The jobs' texts in the order in which the worker ended them."""
    for row in rows.values():
        platform.ended(row, 30)
    text = worker.log.read_text()
    return sorted(rows, key=lambda name: text.index(f"{rows[name].id} attempt 1: completed"))


def test_a_flood_of_one_type_leaves_the_other_its_slots(platform):
    worker = platform.start_worker(queues=BOTH, **ECHO)
    flood = [platform.submit("sleep 60") for _ in range(100)]
    # What finds no slot stays with the broker, where any worker could take it.
    platform.until(lambda: depth(platform) == 36)

    other = platform.ended(platform.submit("now", job_type=JobType.EMBEDDING))
    assert (other.status, other.worker_id) == (JobState.COMPLETED, worker.id)
    assert depth(platform) == 36

    # A slot that becomes free is filled, although the worker waits for the other type meanwhile.
    running = next(row for row in flood if platform.status(row) is JobState.RUNNING)
    platform.dispatch.cancel(running)
    platform.until(lambda: depth(platform) == 35)


def test_two_types_take_turns_for_the_last_slot_and_the_more_urgent_goes_first(platform):
    worker = platform.start_worker(queues=BOTH, GPU_MAX_CONCURRENT_JOBS="1", **ECHO)
    first = platform.submit("sleep 60")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)

    rows = {f"chat {n}": platform.submit(f"chat {n}") for n in range(4)}
    rows |= {f"vector {n}": platform.submit(f"vector {n}", job_type=JobType.EMBEDDING) for n in range(4)}
    rows |= {"urgent": platform.submit("urgent", priority=9)}
    # However long that takes: the slot must find them all.
    publisher = platform.dispatch.links["asia-east"].broker.publisher
    platform.until(lambda: list(publisher.depths(BOTH.split(",")).values()) == [5, 4])
    platform.dispatch.cancel(first)

    done = order(platform, worker, rows)
    assert done[0] == "urgent"
    # The chat came last, so the vectors' turn is next.
    assert done[1:] == [f"{kind} {n}" for n in range(4) for kind in ("vector", "chat")]


def test_a_worker_outside_its_hours_takes_nothing_and_one_within_them_does(platform):
    now = datetime.now(UTC)
    hours = {"GPU_TIMEZONE": "UTC", "GPU_WORKING_HOURS_END": str((now + timedelta(hours=5)).hour)}
    off = platform.start_worker(GPU_WORKING_HOURS_START=str((now + timedelta(hours=3)).hour), **hours)
    row = platform.submit("anybody")
    ledger = platform.dispatch.links["asia-east"].mailbox.ledger
    platform.until(lambda: ledger.position(row.id, "asia-east.llm"))

    on = platform.start_worker(GPU_WORKING_HOURS_START=str((now - timedelta(hours=3)).hour), **hours)

    assert platform.ended(row).worker_id == on.id
    shown = {off.id: WorkerState.OFF_DUTY, on.id: WorkerState.READY}
    link = platform.dispatch.links["asia-east"]
    platform.until(lambda: {card.worker_id: card.state for card in link.cards()} == shown)


def test_at_half_its_share_a_worker_takes_twice_as_long(platform):
    platform.start_worker(GPU_ACCEPTANCE_RATE="0.5", GPU_MAX_CONCURRENT_JOBS="4")
    began = time.monotonic()
    rows = [platform.submit("sleep 0.1") for _ in range(60)]

    for row in rows:
        platform.ended(row, 30)

    # Four slots would need 1.5 s for jobs of a tenth of a second.
    assert time.monotonic() - began > 2.7


def test_messages_that_nobody_can_run_cost_no_slot(platform):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    with kombu.Connection(platform.environ["GPU_BROKER_URL"]) as connection:
        producer = connection.Producer(routing_key=QUEUE)
        producer.publish("no job at all", content_type="text/plain")
        producer.publish({"of": "nobody"}, headers={"task": "tasks.nobody", "id": "1"})
        producer.publish(b"\x00", content_type="application/json", headers={"task": "tasks.llm", "id": "2"})
    publisher = platform.dispatch.links["asia-east"].broker.publisher
    publisher.publish(Job("unknown", JobType.LLM, 1), queue=QUEUE, priority=0)

    assert platform.ended(platform.submit("after")).worker_id == worker.id


def test_a_worker_that_has_nothing_to_ask_for_outlives_the_broker(platform, valkey):
    worker = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="1")
    row = platform.submit("sleep 3")
    platform.until(lambda: platform.status(row) is JobState.RUNNING)

    # Its one slot is taken, so no pop is under way; the server drops all connections.
    valkey.client(0).execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    assert platform.ended(row).attempt == 1
    assert platform.ended(platform.submit("after"), 15).worker_id == worker.id
