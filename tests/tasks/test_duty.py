"""The duty by a clock of the test's own: slots, hours, share, orders."""

import heapq
import threading
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from engines.catalogue import JobType
from tasks.duty import Duty, Hours
from tasks.fleet import WorkerState

LLM, EMBEDDING = JobType.LLM, JobType.EMBEDDING
SLOTS = {LLM: 4, EMBEDDING: 2}


class Clock:
    """Monotonic and wall time that pass when a test says so."""

    def __init__(self, moment=datetime(2026, 1, 1, tzinfo=UTC)):
        self.s = 0.0
        self.moment = moment

    def monotonic(self):
        return self.s

    def now(self):
        return (self.moment + timedelta(seconds=self.s)).timestamp()


def on_duty(clock, slots=SLOTS, **options):
    return Duty(slots, monotonic=clock.monotonic, now=clock.now, **options)


def test_each_type_has_its_own_slots():
    duty = on_duty(Clock())

    assert [duty.try_take(LLM) for _ in range(5)] == [True] * 4 + [False]
    assert duty.room(EMBEDDING) == 2
    assert not duty.open_for(JobType.VISION)

    duty.done(LLM, 1.0)
    assert duty.room(LLM) == 1


def test_the_cap_counts_all_types_together():
    duty = on_duty(Clock(), max_jobs=5)

    assert [duty.try_take(job_type) for job_type in (LLM, LLM, LLM, EMBEDDING)] == [True] * 4
    assert (duty.room(LLM), duty.room(EMBEDDING)) == (1, 1)
    assert duty.try_take(EMBEDDING)
    assert (duty.room(LLM), duty.room(EMBEDDING)) == (0, 0)


def test_many_threads_never_have_more_than_the_slots():
    duty = Duty({LLM: 3})
    held, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal held, most
        for _ in range(300):
            if duty.try_take(LLM):
                with lock:
                    held += 1
                    most = max(most, held)
                with lock:
                    held -= 1
                duty.done(LLM, 0.001)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most <= 3
    assert duty.room(LLM) == 3


def test_a_drained_worker_takes_nothing_until_it_is_resumed_and_a_leaving_one_never_again():
    heard = []
    duty = on_duty(Clock())
    duty.listen(heard.append)
    assert duty.try_take(LLM)

    duty.drain()
    assert (duty.state, duty.try_take(LLM)) == (WorkerState.DRAINING, False)
    duty.done(LLM, 1.0)
    duty.resume()
    assert (duty.state, duty.room(LLM)) == (WorkerState.READY, 4)
    duty.finish()
    duty.resume()
    assert (duty.state, duty.room(LLM)) == (WorkerState.DRAINING, 0)
    # Whoever consumes was woken each time.
    assert heard == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("start", "end", "within"),
    [(9, 17, {*range(9, 17)}), (22, 6, {22, 23, *range(6)}), (0, 23, {*range(23)}), (8, 8, {*range(24)})],
)
def test_hours_start_with_the_one_and_end_before_the_other(start, end, within):
    hours = Hours(start, end, UTC)

    midnight = datetime(2026, 5, 5, tzinfo=UTC)
    assert {hour for hour in range(24) if hours.cover((midnight + timedelta(hours=hour)).timestamp())} == within


def worked(hours, start, span_h):
    """The quarters of an hour after a moment in which it works, as their beginnings in UTC."""
    moments = [start + timedelta(minutes=15 * n) for n in range(4 * span_h)]
    return [moment for moment in moments if hours.cover(moment.timestamp())]


@pytest.mark.parametrize(
    ("zone", "night", "worked_h"),
    [
        # The clock goes from 2 to 3 in the night, so 22 to 6 is one hour less; then from 3 back to 2.
        ("Europe/Berlin", datetime(2026, 3, 28, 12, tzinfo=UTC), 7),
        ("Europe/Berlin", datetime(2026, 10, 24, 12, tzinfo=UTC), 9),
        ("America/New_York", datetime(2026, 3, 7, 18, tzinfo=UTC), 7),
        ("America/New_York", datetime(2026, 10, 31, 18, tzinfo=UTC), 9),
        ("Asia/Shanghai", datetime(2026, 3, 28, 12, tzinfo=UTC), 8),
    ],
)
def test_a_night_shift_follows_the_clock_on_the_wall_through_a_clock_change(zone, night, worked_h):
    quarters = worked(Hours(22, 6, ZoneInfo(zone)), night, 24)

    assert len(quarters) == 4 * worked_h
    local = [moment.astimezone(ZoneInfo(zone)) for moment in quarters]
    assert (local[0].hour, local[0].minute) == (22, 0)
    assert (local[-1].hour, local[-1].minute) == (5, 45)


def test_an_hour_that_the_clock_skips_is_not_worked_and_one_that_comes_twice_is_worked_twice():
    berlin = ZoneInfo("Europe/Berlin")
    skipped = worked(Hours(2, 3, berlin), datetime(2026, 3, 29, tzinfo=UTC), 12)
    twice = worked(Hours(2, 3, berlin), datetime(2026, 10, 24, 22, tzinfo=UTC), 12)

    assert (len(skipped), len(twice)) == (0, 8)


def test_a_worker_is_off_duty_outside_its_hours_and_lets_its_jobs_end():
    clock = Clock(datetime(2026, 5, 5, 16, 59, tzinfo=UTC))
    duty = on_duty(clock, hours=Hours(9, 17, UTC), poll_s=2)
    assert duty.try_take(LLM)

    clock.s = 60
    assert (duty.state, duty.try_take(LLM)) == (WorkerState.OFF_DUTY, False)
    duty.done(LLM, 60)
    clock.s = 16 * 3600 - 1
    assert duty.state is WorkerState.OFF_DUTY
    clock.s = 16 * 3600 + 60
    assert (duty.state, duty.room(LLM)) == (WorkerState.READY, 4)


def simulate(duties, clock, run_s, jobs):
    """How many of the jobs, all waiting from the start, each worker ran; ends when the last one has."""
    counts = [0] * len(duties)
    ends = []
    while jobs or ends:
        for index, duty in enumerate(duties):
            while jobs and duty.try_take(LLM):
                jobs -= 1
                counts[index] += 1
                heapq.heappush(ends, (clock.s + run_s, index))
        # A slot's rest may end before the next job does.
        step = 0.05 if jobs else ends[0][0] - clock.s
        clock.s += min(step, max(0.0, ends[0][0] - clock.s)) if ends else step
        while ends and ends[0][0] <= clock.s:
            _, index = heapq.heappop(ends)
            duties[index].done(LLM, run_s)
    return counts


def test_of_a_thousand_jobs_a_worker_at_half_takes_a_third_beside_one_at_full():
    clock = Clock()
    full, half = on_duty(clock), on_duty(clock, acceptance_rate=0.5)

    counts = simulate([full, half], clock, 1.0, 1000)

    assert sum(counts) == 1000
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_alone_a_worker_gives_its_share_of_what_it_could_do(rate):
    clock = Clock()
    duty = on_duty(clock, acceptance_rate=rate)

    simulate([duty], clock, 1.0, 1000)

    # Four slots and jobs of a second: 250 s at full.
    assert 250 / clock.s == pytest.approx(rate, abs=0.05)


def test_a_worker_that_accepts_nothing_is_off_duty():
    duty = on_duty(Clock(), acceptance_rate=0)

    assert (duty.state, duty.try_take(LLM)) == (WorkerState.OFF_DUTY, False)
