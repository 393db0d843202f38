import gc
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engines.contract import Device, EngineBroken, EngineError, InvalidInput, JobCancelled, OutOfMemory
from engines.grouped import FORGIVE_AFTER, Abandoned, Grouped, Limit, Step
from engines.request import Request
from engines.thread import EngineThread, is_broken, is_out_of_memory, verdict

STEPS = 3


class Job(Request):
    """A request that takes some passes, and may hold the first of them up."""

    def __init__(self, name: str, key: str = "a", *, passes: int = 1, held: bool = False) -> None:
        super().__init__(self._hear)
        self.name = name
        self.key = key
        self.passes = passes
        self.told: list[int] = []
        #: Its engine knows it.
        self.heard = threading.Event()
        self.release = threading.Event()
        self.cancelled = False
        if not held:
            self.release.set()

    def _hear(self, event: Any) -> None:
        self.told.append(event.done)
        self.heard.set()
        if self.cancelled:
            raise JobCancelled


class Work:
    """Computes jobs by their names. `room` together fit; `bad` ones raise."""

    unit = "step"

    def __init__(self) -> None:
        self.passes: list[str] = []
        self.abandoned: list[str] = []
        self.room = 100
        self.most = 100
        self.bad: dict[str, Exception] = {}

    def key(self, request: Job) -> str:
        if request.key == "odd":
            raise ValueError("there is no key")
        return request.key

    def pick(self, alike: Sequence[Job]) -> Sequence[Job]:
        return alike[: self.most]

    def compute(self, batch: Sequence[Job], step: Step) -> None:
        names = " ".join(job.name for job in batch)
        self.passes.append(names)
        try:
            while not all(job.release.wait(0.001) for job in batch):
                step()
            if len(batch) > self.room:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            for job in batch:
                if job.name in self.bad:
                    raise self.bad[job.name]
            for done in range(1, STEPS + 1):
                step(done, STEPS)
        except Abandoned:
            self.abandoned.append(names)
            raise
        for job in batch:
            job.passes -= 1
            if not job.passes:
                job.finish({"name": job.name})


class Rig:
    """A work in its engine thread, and jobs that are submitted one after the other."""

    def __init__(self, device: Device) -> None:
        self.work = Work()
        self.engine: EngineThread[Job] = EngineThread(
            "adder", device, lambda between_steps: Grouped(self.work, between_steps)
        )
        self._pool = ThreadPoolExecutor(32)

    def start(self, job: Job) -> "Future[Job]":
        """Submit it; returns once the engine has taken it in."""
        future = self._pool.submit(self.engine.submit, job)
        assert job.heard.wait(10)
        return future

    def together(self, *jobs: Job) -> "list[Future[Job]]":
        """Let them all wait, in that order, before the first of them is computed."""
        hold = Job("hold", "hold", held=True)
        holding = self.start(hold)
        futures = [self.start(job) for job in jobs]
        hold.release.set()
        holding.result(10)
        self.work.passes.remove("hold")
        return futures

    def close(self) -> None:
        self.engine.close()
        self._pool.shutdown()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Engines collect garbage when they close: a second each time for all that torch has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(Device("cpu"))
    yield rig
    rig.close()


def errors(futures: Sequence["Future[Job]"]) -> list[Exception | None]:
    return [future.exception(10) for future in futures]  # type: ignore[misc]


# --- who is computed with whom, and when


def test_equal_keys_share_a_pass_and_others_do_not(rig: Rig) -> None:
    jobs = [Job("a1"), Job("b1", "b"), Job("a2"), Job("b2", "b")]

    results = [future.result(10).result for future in rig.together(*jobs)]

    assert rig.work.passes == ["a1 a2", "b1 b2"]
    assert results == [{"name": job.name} for job in jobs]
    assert all(job.told[-STEPS:] == [1, 2, 3] for job in jobs)


def test_the_oldest_is_always_next_so_a_stream_of_one_key_starves_nobody(rig: Rig) -> None:
    rig.work.most = 2
    stream = [Job(f"a{number}", held=number == 1) for number in range(1, 6)]

    futures = rig.together(stream[0], Job("b", "b"))
    futures += [rig.start(job) for job in stream[1:]]
    stream[0].release.set()

    assert errors(futures) == [None] * 6
    assert rig.work.passes == ["a1", "b", "a2 a3", "a4 a5"]


def test_what_is_left_unfinished_waits_behind_all_others(rig: Rig) -> None:
    futures = rig.together(Job("long", passes=3), Job("b", "b"), Job("c", "c"))

    assert errors(futures) == [None] * 3
    assert rig.work.passes == ["long", "b", "c", "long", "long"]


# --- stopping


def test_a_pass_that_nobody_wants_any_more_is_abandoned_and_one_that_somebody_wants_is_not(rig: Rig) -> None:
    one, other = Job("one", held=True), Job("other")
    one_ends, other_ends = rig.together(one, other)

    one.cancelled = True
    assert isinstance(one_ends.exception(10), JobCancelled)
    abandoned_too_early = list(rig.work.abandoned)
    other.cancelled = True
    assert isinstance(other_ends.exception(10), JobCancelled)
    rig.start(Job("next")).result(10)

    assert abandoned_too_early == []
    assert rig.work.abandoned == ["one other"]


def test_a_request_that_waits_can_be_cancelled_during_a_pass_and_is_never_computed(rig: Rig) -> None:
    running, waiting = Job("running", held=True), Job("waiting", "b")
    futures = [rig.start(running), rig.start(waiting)]

    waiting.cancelled = True
    assert isinstance(futures[1].exception(10), JobCancelled)
    assert not futures[0].done()
    running.release.set()

    assert futures[0].result(10).result == {"name": "running"}
    assert rig.work.passes == ["running"]


def test_close_ends_who_is_computed_and_who_waits(rig: Rig) -> None:
    futures = [rig.start(Job("running", held=True)), rig.start(Job("waiting", "b"))]

    rig.engine.close()

    assert [type(error) for error in errors(futures)] == [EngineBroken, EngineBroken]
    assert rig.work.abandoned == ["running"]
    with pytest.raises(EngineBroken, match="closed"):
        rig.engine.submit(Job("late"))


# --- out of memory


def test_out_of_memory_halves_what_is_computed_together_and_that_is_remembered_by_key(rig: Rig) -> None:
    rig.work.room = 3

    first = rig.together(*(Job(f"{number}") for number in range(8)), Job("b", "b"), Job("c", "b"), Job("d", "b"))
    assert errors(first) == [None] * 11
    before = [name.count(" ") + 1 for name in rig.work.passes]
    second = rig.together(*(Job(f"{number}") for number in range(4)))

    assert errors(second) == [None] * 4
    assert before == [8, 4, 2, 2, 2, 2, 3]
    assert rig.work.passes[7:] == ["0 1", "2 3"]


def test_after_enough_full_passes_twice_as_many_are_tried_again() -> None:
    work = Work()
    work.room = 2
    grouped: Grouped[Job] = Grouped(work, lambda: True)
    waiting = deque(Job(f"{number}", passes=1000) for number in range(4))
    with pytest.raises(torch.OutOfMemoryError):
        grouped.turn(waiting)
    waiting.extendleft(reversed(grouped.make_room()))

    work.room = 100
    for _ in range(FORGIVE_AFTER + 1):
        grouped.turn(waiting)

    assert work.passes[1:-1] == ["0 1", "2 3"] * (FORGIVE_AFTER // 2)
    assert work.passes[-1] == "0 1 2 3"


def test_a_limit_is_not_forgiven_by_passes_that_were_half_empty_nor_above_what_it_was() -> None:
    limit = Limit(100)
    limit.halve(80)

    for _ in range(FORGIVE_AFTER):
        limit.fitted(20)
    after_small = limit.now
    for _ in range(FORGIVE_AFTER * 5):
        limit.fitted(100)

    assert after_small == 40
    assert limit.now == 100


def test_one_that_does_not_fit_alone_fails_with_the_numbers_and_the_next_runs(rig: Rig) -> None:
    rig.work.room = 0
    failed = rig.start(Job("large")).exception(10)
    rig.work.room = 1

    assert isinstance(failed, OutOfMemory)
    assert "A job of adder does not fit cpu even alone" in failed.message
    assert "GiB are free: tried to allocate 2 GiB" in failed.message
    assert rig.start(Job("small")).result(10).result == {"name": "small"}


# --- other failures


def test_after_a_failure_each_is_tried_alone_before_others_and_only_the_bad_one_fails(rig: Rig) -> None:
    rig.work.bad["2"] = InvalidInput("the picture is odd", code="odd_picture")

    futures = rig.together(Job("1"), Job("2"), Job("3"), Job("other", "b"))

    assert rig.work.passes[:1] == ["1 2 3"]
    failed = errors(futures)
    assert rig.work.passes == ["1 2 3", "1", "2", "3", "other"]
    assert [type(error) for error in failed] == [type(None), InvalidInput, type(None), type(None)]
    assert (failed[1].message, failed[1].code) == ("the picture is odd", "odd_picture")  # type: ignore[union-attr]


def test_a_library_that_wraps_abandoned_breaks_nothing(rig: Rig) -> None:
    def wrap(batch: Sequence[Job], step: Step) -> None:
        try:
            while True:
                step()
        except Abandoned as error:
            raise RuntimeError("the library gave up") from error

    compute, rig.work.compute = rig.work.compute, wrap  # type: ignore[method-assign]
    job = Job("lone")
    future = rig.start(job)
    job.cancelled = True
    assert isinstance(future.exception(10), JobCancelled)
    rig.work.compute = compute  # type: ignore[method-assign]

    assert rig.start(Job("next")).result(10).result == {"name": "next"}


def test_a_request_that_has_no_key_fails_alone(rig: Rig) -> None:
    odd, good = rig.together(Job("odd", "odd"), Job("good"))

    assert isinstance(odd.exception(10), EngineError)
    assert good.result(10).result == {"name": "good"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), torch.AcceleratorError("an illegal memory access")],
)
def test_a_dead_device_ends_everybody_at_once_and_for_good(rig: Rig, error: Exception) -> None:
    rig.work.bad["2"] = error

    futures = rig.together(Job("1"), Job("2"), Job("waiting", "b"))

    assert [type(error) for error in errors(futures)] == [EngineBroken] * 3
    assert rig.work.passes == ["1 2"]
    with pytest.raises(EngineBroken, match=str(error)):
        rig.engine.submit(Job("late"))


def test_what_an_error_quotes_is_told_to_nobody_but_the_one_job_that_was_computed(rig: Rig) -> None:
    # A client's words must not pass for the device's either.
    odd = ValueError("cannot read 'CUDA error: out of memory'")

    rig.work.bad["lone"] = odd

    with pytest.raises(EngineError, match="cannot read") as alone:
        rig.engine.submit(Job("lone"))
    shared = verdict(odd, alone=False)

    assert type(alone.value) is type(shared) is EngineError
    assert "ValueError" in shared.message
    assert "cannot read" not in shared.message


def test_a_device_that_dies_while_memory_is_cleared_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    rig = Rig(Device("cuda:0"))
    rig.work.room = 0
    job = rig.start(Job("job")).exception(10)
    rig.close()

    assert isinstance(job, EngineBroken)
    assert "unspecified launch failure" in job.message


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_cuda_s_libraries_and_the_host_lack_is_no_dead_device(rig: Rig, text: str) -> None:
    rig.work.bad["job"] = RuntimeError(text)

    assert isinstance(rig.start(Job("job")).exception(10), OutOfMemory)
    assert is_out_of_memory(RuntimeError(text))
    assert not is_broken(RuntimeError("shapes do not match"))


def test_nothing_of_a_pass_is_held_when_it_is_over() -> None:
    grouped: Grouped[Job] = Grouped(Work(), lambda: True)
    waiting = deque([Job("job")])
    seen = weakref.ref(waiting[0])

    grouped.turn(waiting)
    gc.collect()

    assert seen() is None
