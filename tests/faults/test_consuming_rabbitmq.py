"""Real workers on RabbitMQ take jobs by their duty; what comes beyond it goes back."""

from collections.abc import Callable

import pytest

from engines.catalogue import JobType
from tasks.job import JobState
from tests.rig import Platform
from tests.servers import RabbitMq

QUEUE, PINNED, VECTORS = "asia-east.llm", "asia-east.llm.local", "asia-east.embedding"
BOTH = f"{QUEUE},{VECTORS}"
ECHO = {"GPU_LLM_MODEL": "echo", "GPU_EMBEDDING_MODEL": "echo"}


@pytest.fixture
def platform(make_platform: Callable[..., Platform], rabbitmq: RabbitMq) -> Platform:
    """A platform with its reconciler running and no worker yet."""
    return make_platform(GPU_BROKER_URL=rabbitmq.url)


def depths(platform: Platform) -> dict[str, int]:
    """Messages that nobody has taken."""
    return platform.dispatch.links["asia-east"].broker.publisher.depths([QUEUE, PINNED, VECTORS])


def waiting(platform: Platform) -> int:
    """Chats that no worker has begun."""
    return platform.dispatch.links["asia-east"].mailbox.ledger.queues()[QUEUE].depth


def order(platform, worker, rows):
    """The jobs' names in the order in which the worker ended them."""
    for row in rows.values():
        platform.ended(row, 30)
    text = worker.log.read_text()
    return sorted(rows, key=lambda name: text.index(f"{rows[name].id} attempt 1: completed"))


def test_a_flood_of_one_type_leaves_the_other_its_slots(platform):
    worker = platform.start_worker(queues=BOTH, **ECHO)
    flood = [platform.submit("sleep 60", allow_cross_region=n % 2 == 0) for n in range(100)]
    # Two queues of one type: each may have sent as many as there are slots, and what is too much went back.
    platform.until(lambda: waiting(platform) == 36, 30)
    # A message that a busy broker confirmed too late is there twice.
    platform.until(lambda: sum(depths(platform).values()) >= 36)

    other = platform.ended(platform.submit("now", job_type=JobType.EMBEDDING))
    assert (other.status, other.worker_id) == (JobState.COMPLETED, worker.id)
    assert waiting(platform) == 36

    running = next(row for row in flood if platform.status(row) is JobState.RUNNING)
    platform.dispatch.cancel(running)
    platform.until(lambda: waiting(platform) == 35)
    assert worker.process.poll() is None


def test_two_types_and_two_queues_of_one_take_turns_for_the_last_slot(platform):
    worker = platform.start_worker(queues=BOTH, GPU_MAX_CONCURRENT_JOBS="1", **ECHO)
    first = platform.submit("sleep 1.5")
    platform.until(lambda: platform.status(first) is JobState.RUNNING)

    rows = {f"chat {n}": platform.submit("sleep 0.05") for n in range(6)}
    rows |= {f"pinned {n}": platform.submit("sleep 0.05", allow_cross_region=False) for n in range(6)}
    rows |= {f"vector {n}": platform.submit("sleep 0.05", job_type=JobType.EMBEDDING) for n in range(6)}
    platform.until(lambda: depths(platform) == {QUEUE: 6, PINNED: 6, VECTORS: 6})
    done = order(platform, worker, rows)

    for kind in ("chat", "pinned", "vector"):
        assert [name for name in done if name.startswith(kind)] == [f"{kind} {n}" for n in range(6)]
    # Half of the turns are the other type's while it has any, and both queues of the one have theirs.
    assert sum(name.startswith("vector") for name in done[:8]) >= 3
    assert {name.split()[0] for name in done[:6]} == {"chat", "pinned", "vector"}


def test_a_full_worker_leaves_what_is_too_much_to_one_that_comes(platform):
    platform.start_worker(GPU_MAX_CONCURRENT_JOBS="2")
    flood = [platform.submit("sleep 20") for _ in range(4)]
    platform.until(lambda: depths(platform)[QUEUE] == 2)

    other = platform.start_worker(GPU_MAX_CONCURRENT_JOBS="2")

    platform.until(lambda: depths(platform)[QUEUE] == 0)
    platform.until(lambda: sum(platform.row(row).worker_id == other.id for row in flood) == 2)
