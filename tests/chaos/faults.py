"""What the harness does to the platform: one function for each kind of fault, under the names of the specification.

Partitions of whole regions (F10) are tests/faults/test_regions.py on tests/chaos/regions.py; load (F13, F14) is not a
fault of a part.
"""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import celeryconfig
from tests.chaos.clients import Wish
from tests.chaos.entry import DIE_AFTER_SEND, DIE_BEFORE_SEND
from tests.chaos.parts import Part, clock_library
from tests.chaos.scene import BACKENDS, Scene, Strike
from tests.rig import until

#: Nothing that was broken stays so for longer than this, whatever else is broken at the time.
MENDED_S = 60


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault."""

    #: In the specification's list.
    number: str
    #: How often it comes against the others.
    weight: int
    #: Does it, and returns when the part is whole again.
    make: Callable[[Scene, str], None]
    backends: tuple[str, ...] = BACKENDS


def _probe(scene: Scene) -> Wish:
    """A job that overtakes all others: its end says that the platform works again."""
    return scene.clients.wish(Wish(f"probe {len(scene.clients.wishes)}", priority=9))


# Workers


def _worker_kill(scene: Scene, kind: str) -> None:
    part, wish = scene.caught(2)
    part = part or scene.one("worker")
    at, pid = time.monotonic(), part.pid
    part.signal(signal.SIGKILL)
    scene.struck(Strike(kind, at, at, pid=pid, probes=(wish,)))


def _worker_freeze(scene: Scene, kind: str) -> None:
    _freeze(scene, kind, scene.random.uniform(1, 4))


def _worker_zombie(scene: Scene, kind: str) -> None:
    """Frozen for longer than its lease, in the background: it comes back to jobs that others have."""
    _freeze(scene, kind, 12.5, wait=False)


def _freeze(scene: Scene, kind: str, seconds: float, *, wait: bool = True) -> None:
    part, wish = scene.caught(2)
    part = part or scene.one("worker")
    at, pid = time.monotonic(), part.pid
    process = part.process
    process.send_signal(signal.SIGSTOP)

    def thaw() -> None:
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    scene.struck(Strike(kind, at, at if not wait else at + seconds, pid=pid, probes=(wish,)))
    thread = threading.Thread(target=thaw)
    thread.start()
    if wait:
        thread.join()


def _worker_term(scene: Scene, kind: str) -> None:
    """A rolling restart: what runs may end."""
    part, wish = scene.caught(2)
    part = part or scene.one("worker")
    at = time.monotonic()
    process = part.process
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None, MENDED_S)
    scene.struck(Strike(kind, at, at, probes=(wish, _probe(scene))))


def _worker_clock(scene: Scene, kind: str) -> None:
    """A worker whose clock is an hour off takes part from now on."""
    part = scene.one("worker")
    hours = scene.random.choice((-1, 1))
    part.environ |= {
        "LD_PRELOAD": str(clock_library()),
        "FAKETIME": f"{hours:+d}h",
        # Its deadlines are of the monotonic clock, which no one sets.
        "DONT_FAKE_MONOTONIC": "1",
    }
    process, at = part.process, time.monotonic()
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None, MENDED_S)
    scene.struck(Strike(kind, at, at, probes=(_probe(scene),)))


# API and control


def _api_kill(scene: Scene, kind: str) -> None:
    (part,) = scene.supervisor.named("api")
    at = time.monotonic()
    probe = _probe(scene)
    part.signal(signal.SIGKILL)
    _until_api(scene, part)
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


def _api_commit(scene: Scene, kind: str) -> None:
    """It dies when the row is committed and nothing is published."""
    _die_at(scene, kind, DIE_BEFORE_SEND, f"number {len(scene.clients.wishes)} is kept")


def _api_publish(scene: Scene, kind: str) -> None:
    """It dies when the message is out, which nobody has noted: it will be sent again while it runs."""
    _die_at(scene, kind, DIE_AFTER_SEND, f"sleep 4.{len(scene.clients.wishes):05d}1")


def _die_at(scene: Scene, kind: str, point: str, words: str) -> None:
    (part,) = scene.supervisor.named("api")
    process, at = part.process, time.monotonic()
    (scene.folder / point).write_text(words)
    wish = scene.clients.wish(Wish(words, priority=9))
    until(lambda: process.poll() is not None or wish.ended.is_set(), MENDED_S)
    _until_api(scene, part)
    scene.struck(Strike(kind, at, time.monotonic(), probes=(wish,)))


def _until_api(scene: Scene, part: Part) -> None:
    until(lambda: part.process.poll() is None and scene.answers(), MENDED_S)


def _control_kill(scene: Scene, kind: str) -> None:
    """Both at once, while a job is held that only they can send."""
    at = time.monotonic()
    for part in scene.supervisor.named("control"):
        part.signal(signal.SIGKILL)
    scene.struck(Strike(kind, at, time.monotonic(), probes=(_probe(scene),)))


# Store and broker


def _store_kill(scene: Scene, kind: str) -> None:
    _store_away(scene, kind, lose=False)


def _store_lose(scene: Scene, kind: str) -> None:
    """With all its data."""
    _store_away(scene, kind, lose=True)


def _store_away(scene: Scene, kind: str, *, lose: bool) -> None:
    at = time.monotonic()
    scene.store.kill(lose=lose)
    probe = _probe(scene)
    time.sleep(scene.random.uniform(0.2, 3))
    scene.store.start()
    scene.struck(Strike(kind, at, time.monotonic(), spoils_runs=lose, probes=(probe,)))


def _store_flush(scene: Scene, kind: str) -> None:
    at = time.monotonic()
    scene.store.client().flushall()
    scene.struck(Strike(kind, at, time.monotonic(), spoils_runs=True, probes=(_probe(scene),)))


def _store_unfolded(scene: Scene, kind: str) -> None:
    """Emptied while it holds outcomes that no row has: nobody folds meanwhile, and no one asks."""
    (api,) = scene.supervisor.named("api")
    readers = [part.process for part in [api, *scene.supervisor.named("control")]]
    part, wish = scene.caught(0.7)
    at = time.monotonic()
    for process in readers:
        process.send_signal(signal.SIGSTOP)
    try:
        end = time.monotonic() + 5
        while part is not None and time.monotonic() < end:
            if any(run.job == wish.id and run.end is not None for run in scene.runs()):
                # The outcome is handed in just after the run has ended.
                until(lambda: scene.store.client(1).exists(f"done:{wish.id}"))
                break
            time.sleep(0.02)
        scene.store.client().flushall()
    finally:
        for process in readers:
            process.send_signal(signal.SIGCONT)
    scene.struck(Strike(kind, at, time.monotonic(), spoils_runs=True, probes=(wish,)))


def _store_freeze(scene: Scene, kind: str) -> None:
    _during(scene, kind, scene.store.frozen())


def _store_full(scene: Scene, kind: str) -> None:
    """It takes no more writes (F9)."""
    client = scene.store.client()
    at = time.monotonic()
    client.config_set("maxmemory", "1mb")
    probe = _probe(scene)
    time.sleep(scene.random.uniform(1, 3))
    client.config_set("maxmemory", "0")
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


def _broker_empty(scene: Scene, kind: str) -> None:
    """Every message is gone, and the store knows nothing of it."""
    at = time.monotonic()
    probe = _probe(scene)
    if scene.rabbitmq is None:
        scene.store.client(0).flushdb()
    else:
        scene.rabbitmq.empty(queue.name for queue in celeryconfig.queues_for(scene.rabbitmq.url))
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


def _broker_kill(scene: Scene, kind: str) -> None:
    assert scene.rabbitmq is not None
    at = time.monotonic()
    scene.rabbitmq.kill()
    probe = _probe(scene)
    scene.rabbitmq.start()
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


def _broker_freeze(scene: Scene, kind: str) -> None:
    assert scene.rabbitmq is not None
    at = time.monotonic()
    scene.rabbitmq.freeze()
    probe = _probe(scene)
    time.sleep(scene.random.uniform(1, 3))
    scene.rabbitmq.thaw()
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


# SQL


def _sql_lock(scene: Scene, kind: str) -> None:
    _during(scene, kind, scene.database.locked())


def _sql_away(scene: Scene, kind: str) -> None:
    _during(scene, kind, scene.database.away())


def _during(scene: Scene, kind: str, broken: AbstractContextManager[None]) -> None:
    at = time.monotonic()
    with broken:
        probe = _probe(scene)
        time.sleep(scene.random.uniform(1, 3))
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


# Wires


def _wire_slow(scene: Scene, kind: str) -> None:
    at = time.monotonic()
    wire = scene.random.choice(scene.wires)
    wire.delay(scene.random.choice((0.08, 0.2)))
    probe = _probe(scene)
    time.sleep(scene.random.uniform(1, 3))
    wire.heal()
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


def _wire_cut(scene: Scene, kind: str) -> None:
    """Each connection of one wire is reset some times in a row, whatever is on it."""
    at = time.monotonic()
    wire = scene.random.choice(scene.wires)
    probe = _probe(scene)
    for _ in range(4):
        wire.cut()
        time.sleep(scene.random.uniform(0.05, 0.3))
    scene.struck(Strike(kind, at, time.monotonic(), probes=(probe,)))


# Jobs


def _poison(scene: Scene, kind: str) -> None:
    """It ends every process that runs it; others run beside it."""
    at = time.monotonic()
    scene.struck(Strike(kind, at, at, probes=(scene.clients.wish(Wish("die", priority=9)),)))


def _hang(scene: Scene, kind: str) -> None:
    """It hears neither cancel nor deadline: its worker has to go."""
    at = time.monotonic()
    wish = scene.clients.wish(Wish("hang 25", priority=9, timeout_s=1))
    scene.struck(Strike(kind, at, at, probes=(wish,)))


def _race(scene: Scene, kind: str) -> None:
    """Pairs that want one job at one moment: cancel against begin, end and itself, a submit against itself."""
    at = time.monotonic()
    wishes = []
    for number in range(6):
        seconds = 0.05 * (number + 1)
        wishes.append(
            scene.clients.wish(Wish(f"sleep {seconds:g}"), at=at + 0.1, cancel_after=seconds + 0.05, repeat=True)
        )
    for wish in wishes:
        scene.clients.at(at + 0.5, lambda wish=wish: scene.clients.cancel(wish))
        # Long after its end: it has to stay what it is.
        scene.clients.at(at + 2.5, lambda wish=wish: scene.clients.cancel(wish))
    end = time.monotonic() + 3
    while time.monotonic() < end and not all(wish.ended.is_set() for wish in wishes):
        time.sleep(0.05)
    scene.struck(Strike(kind, at, at + 0.5, probes=tuple(wishes)))


FAULTS: Mapping[str, Fault] = {
    "worker-kill": Fault("F1", 10, _worker_kill),
    "worker-freeze": Fault("F2", 5, _worker_freeze),
    "worker-zombie": Fault("F2", 3, _worker_zombie),
    "api-kill": Fault("F3", 5, _api_kill),
    "api-commit": Fault("F3", 5, _api_commit),
    "api-publish": Fault("F3", 4, _api_publish),
    "control-kill": Fault("F4", 4, _control_kill),
    "store-kill": Fault("F5", 5, _store_kill),
    "store-lose": Fault("F5", 4, _store_lose),
    "broker-kill": Fault("F5", 3, _broker_kill, ("rabbitmq",)),
    "broker-empty": Fault("F5", 4, _broker_empty),
    "broker-freeze": Fault("F6", 3, _broker_freeze, ("rabbitmq",)),
    "store-freeze": Fault("F6", 5, _store_freeze),
    "store-flush": Fault("F7", 4, _store_flush),
    "store-unfolded": Fault("F7", 4, _store_unfolded),
    "sql-lock": Fault("F8", 5, _sql_lock),
    "sql-away": Fault("F8", 4, _sql_away, ("postgres", "rabbitmq")),
    "store-full": Fault("F9", 3, _store_full),
    "wire-slow": Fault("F11", 4, _wire_slow),
    "wire-cut": Fault("F11", 5, _wire_cut),
    "poison": Fault("F12", 3, _poison),
    "hang": Fault("F12", 2, _hang),
    "worker-clock": Fault("F15", 2, _worker_clock),
    "race": Fault("F16", 6, _race),
    "worker-term": Fault("F17", 5, _worker_term),
}


def possible(backend: str) -> list[str]:
    """The kinds that this machine and the backend can have."""
    kinds = [kind for kind, fault in FAULTS.items() if backend in fault.backends]
    if clock_library() is None:
        kinds.remove("worker-clock")
    return kinds


def left_out(backend: str) -> str:
    """What is missing from possible(), in words for the table; empty if nothing is."""
    missing = [f"{kind} ({FAULTS[kind].number})" for kind in FAULTS if kind not in possible(backend)]
    why = "" if clock_library() else "; libfaketime is not installed, so no clock is changed"
    return f"left out with {backend}: {', '.join(missing)}{why}" if missing else ""
