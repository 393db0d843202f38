"""Every change of a job's row, on SQLite and on PostgreSQL."""

import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from app.job_table import UNPROVEN_S, JobRow
from app.rows import RUN_GRACE_S, IdempotencyConflict, Rows, fingerprint_of
from app.tables import open_database
from engines.catalogue import JobType
from tasks.job import LIVE, TERMINAL, DirectJob, Envelope, JobError, JobState

ERROR = JobError("worker_lost", "It was tried three times.")


@pytest.fixture
def database(any_database_url: str) -> Iterator[Engine]:
    """An empty database of the test's own."""
    engine = open_database(any_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(database: Engine) -> Rows:
    """The jobs table."""
    return Rows(database)


@pytest.fixture
def other_rows(any_database_url: str) -> Iterator[Rows]:
    """The same table as another process has it open."""
    engine = open_database(any_database_url)
    yield Rows(engine)
    engine.dispose()


def submit(rows: Rows, **changes: Any) -> JobRow:
    """A new job."""
    return insert(rows, **changes)[0]


def insert(rows: Rows, **changes: Any) -> tuple[JobRow, bool]:
    values: dict[str, Any] = {
        "owner": "ann",
        "type": JobType.LLM,
        "model": None,
        "requested_model": None,
        "params": "{}",
        "priority": 0,
        "region_wanted": None,
        "region": "asia-east",
        "allow_cross_region": True,
        "timeout_seconds": 60.0,
        "queue_timeout_seconds": None,
        "idempotency_key": None,
        "fingerprint": None,
        **changes,
    }
    return rows.insert(values.pop("id", None) or str(uuid.uuid4()), **values)


def begin(rows: Rows, row: JobRow, started_at: float | None = None) -> JobRow:
    """The job, running."""
    begun = rows.begun(row.id, attempt=row.attempt, worker_id="w1", started_at=started_at)
    assert begun is not None
    return begun


def envelope(row: JobRow, outcome: JobState = JobState.COMPLETED, **changes: Any) -> Envelope:
    """What worker w1 in asia-south says of the job's attempt."""
    result = {"response": "hi"} if outcome is JobState.COMPLETED else None
    values: dict[str, Any] = {"worker_id": "w1", "region": "asia-south", "run_s": 1.0, "result": result, **changes}
    return Envelope(row.id, row.attempt, outcome=outcome, **values)


def end(rows: Rows, row: JobRow, outcome: JobState) -> JobRow:
    """The job, ended by the way that leads to this outcome."""
    match outcome:
        case JobState.COMPLETED:
            ended = rows.end_with(envelope(row), started_at=None)
        case JobState.CANCELLED:
            ended = rows.cancel(row.id)
        case _:
            ended = rows.end(row.id, outcome, error=ERROR)
    assert ended is not None
    return ended


def age(database: Engine, row: JobRow, seconds: float, *columns: str) -> None:
    """Make the job's times lie further back."""
    given = ", ".join(f"{column} = {column} - :seconds" for column in columns)
    with database.connect() as connection:
        connection.execute(text(f"UPDATE jobs SET {given} WHERE id = :id"), {"seconds": seconds, "id": row.id})


def column(database: Engine, row: JobRow, name: str) -> Any:
    with database.connect() as connection:
        return connection.execute(text(f"SELECT {name} FROM jobs WHERE id = :id"), {"id": row.id}).scalar_one()


def ids(found: list[JobRow]) -> list[str]:
    return [row.id for row in found]


# What is kept


def test_a_new_job_is_queued_with_all_that_was_asked_for(rows, database):
    asked = {
        "params": '{"text": "it\'s \\"quoted\\", 你好，世界 🙂 %s :name"}',
        "priority": 9,
        "region_wanted": "europe-west",
        "region": "america-north",
        "allow_cross_region": False,
        "timeout_seconds": 1.5,
        "queue_timeout_seconds": 30.0,
        "fingerprint": fingerprint_of({"a": 1}),
        "type": JobType.IMAGE_GEN,
        "owner": "o'neill",
    }

    row, new = insert(rows, **asked)

    assert new
    kept = {name: value for name, value in asked.items() if name != "queue_timeout_seconds"}
    assert {name: getattr(row, name) for name in kept} == kept
    assert (row.status, row.attempt, row.version, row.sends, row.withdrawn) == (JobState.QUEUED, 1, 1, 0, False)
    assert (row.started_at, row.completed_at, row.worker_id, row.result, row.error_code) == (None,) * 5
    assert row.queue_deadline == pytest.approx(row.created_at + 30, abs=0.01)
    assert column(database, row, "due_at") == pytest.approx(row.created_at + UNPROVEN_S, abs=0.01)
    assert rows.get(row.id) == row


def test_times_are_the_databases_own(rows, database, monkeypatch):
    before = time.time()
    monkeypatch.setattr(time, "time", lambda: 0.0)

    row = end(rows, begin(rows, submit(rows)), JobState.COMPLETED)

    assert before - 1 < row.created_at <= row.started_at <= row.completed_at < before + 10


def test_a_result_is_kept_letter_for_letter(rows):
    result = {"response": "他说：“你好” 'it''s' \"ok\" \\ % \u0000 🙂", "n": [1, 2.5, None, True]}
    row = begin(rows, submit(rows))

    ended = rows.end_with(envelope(row, result=result), started_at=None)

    assert json.loads(ended.result) == result
    assert rows.get(row.id) == ended


@pytest.mark.parametrize("words", ["模型说：“不行”, it's no", "a\x00b", "half of a pair: \ud83d"])
def test_an_error_is_kept_whatever_characters_the_engine_put_into_it(rows, words):
    row = begin(rows, submit(rows))

    ended = rows.end_with(envelope(row, JobState.FAILED, error=JobError("engine_error", words)), started_at=None)

    assert ended.status is JobState.FAILED
    assert (ended.error_code, ended.result) == ("engine_error", None)
    assert ended.error_message == words.replace("\x00", "?").replace("\ud83d", "?")


def test_a_job_is_found_by_its_owner_and_by_nobody_else(rows):
    row = submit(rows)

    assert rows.get(row.id, "ann") == row
    assert rows.get(row.id, "bob") is None
    assert rows.get("unknown") is None
    assert rows.get_all([row.id, "unknown"]) == {row.id: row}


# The states: they only climb


def test_a_job_begins_and_ends_with_what_its_worker_says(rows):
    queued = submit(rows)

    running = begin(rows, queued)
    ended = rows.end_with(envelope(running), started_at=running.started_at)

    assert (running.status, running.worker_id, running.version) == (JobState.RUNNING, "w1", 2)
    assert (ended.status, ended.region, ended.result) == (JobState.COMPLETED, "asia-south", '{"response":"hi"}')
    assert (ended.started_at, ended.version) == (running.started_at, 3)
    assert ended.completed_at >= ended.started_at


def test_a_queued_job_may_end_without_its_beginning_having_been_heard_of(rows, database):
    row = submit(rows)
    age(database, row, 10, "created_at")
    created_at = rows.get(row.id).created_at

    ended = rows.end_with(envelope(row), started_at=created_at + 4)

    assert (ended.status, ended.started_at) == (JobState.COMPLETED, created_at + 4)


@pytest.mark.parametrize("way", ["begun", "ended"])
def test_no_job_starts_before_it_was_made_even_if_the_stores_clock_is_behind(rows, way):
    row = submit(rows)
    early = row.created_at - 5

    row = begin(rows, row, early) if way == "begun" else rows.end_with(envelope(row), started_at=early)

    assert row.started_at == row.created_at


def test_only_the_attempt_that_stands_can_begin(rows):
    row = submit(rows)

    assert rows.begun(row.id, attempt=2, worker_id="w1", started_at=None) is None
    assert rows.next_attempt(row.id, attempt=2) is None
    again = rows.next_attempt(row.id, attempt=1)
    assert (again.status, again.attempt) == (JobState.QUEUED, 2)
    assert rows.begun(row.id, attempt=1, worker_id="late", started_at=None) is None
    assert rows.begun(row.id, attempt=2, worker_id="w2", started_at=None).worker_id == "w2"


def test_a_lost_attempt_is_due_at_once_and_its_job_still_runs_for_its_owner(rows):
    row = begin(rows, submit(rows))
    rows.sent([(row.id, 1)], epoch="e")
    assert rows.due(10) == []

    again = rows.next_attempt(row.id, attempt=1)

    assert (again.status, again.attempt) == (JobState.RUNNING, 2)
    assert ids(rows.due(10)) == [row.id]


def test_a_job_is_begun_once_by_a_worker_and_again_by_one_it_was_given_to(rows):
    row = begin(rows, submit(rows))

    assert rows.begun(row.id, attempt=1, worker_id="w1", started_at=None) is None
    assert rows.get(row.id) == row
    again = rows.begun(row.id, attempt=1, worker_id="w2", started_at=None)
    assert (again.status, again.worker_id, again.started_at) == (JobState.RUNNING, "w2", row.started_at)


@pytest.mark.parametrize("state", LIVE)
def test_a_live_job_can_be_cancelled_and_the_ledger_has_to_be_told(rows, state):
    row = submit(rows) if state is JobState.QUEUED else begin(rows, submit(rows))
    rows.sent([(row.id, 1)], epoch="e")

    cancelled = rows.cancel(row.id)

    assert (cancelled.status, cancelled.error_code) == (JobState.CANCELLED, None)
    assert cancelled.completed_at >= cancelled.created_at
    assert ids(rows.due(10)) == [row.id]
    rows.told(row.id)
    assert rows.due(10) == []


def test_an_end_that_no_worker_reported_can_ask_for_the_state_it_expects(rows):
    row = begin(rows, submit(rows))

    assert rows.end(row.id, JobState.TIMEOUT, error=ERROR, status=JobState.QUEUED) is None
    ended = rows.end(row.id, JobState.TIMEOUT, error=ERROR, status=JobState.RUNNING)

    assert (ended.status, ended.error_code, ended.error_message) == (JobState.TIMEOUT, ERROR.code, ERROR.message)
    assert ids(rows.due(10)) == [row.id]


@pytest.mark.parametrize("outcome", TERMINAL)
def test_a_job_that_ended_is_never_changed_again(rows, outcome):
    row = end(rows, begin(rows, submit(rows, idempotency_key="key")), outcome)

    assert row.ended
    assert row.status is outcome
    assert rows.begun(row.id, attempt=1, worker_id="w2", started_at=None) is None
    for other in TERMINAL:
        assert rows.end_with(envelope(row, other, worker_id="w2"), started_at=None) is None
        assert rows.end(row.id, other, error=ERROR) is None
    assert rows.cancel(row.id) is None
    assert rows.next_attempt(row.id, attempt=1) is None
    assert rows.send_again(row.id) is None
    assert rows.withdraw(row) is False
    rows.sent([(row.id, 1)], epoch="e")
    rows.told(row.id)
    rows.remove(row.id)
    assert rows.get(row.id) == row


def test_of_a_cancel_and_a_result_that_come_together_exactly_one_wins(rows, other_rows):
    jobs = [begin(rows, submit(rows)) for _ in range(200)]
    together = threading.Barrier(2)

    def race(change: Callable[[JobRow], JobRow | None]) -> list[JobRow | None]:
        changed = []
        for job in jobs:
            together.wait()
            changed.append(change(job))
        return changed

    with ThreadPoolExecutor(2) as pool:
        cancels = pool.submit(race, lambda job: rows.cancel(job.id))
        results = pool.submit(race, lambda job: other_rows.end_with(envelope(job), started_at=None))

    for job, *changed in zip(jobs, cancels.result(), results.result(), strict=True):
        winners = [row for row in changed if row is not None]
        assert len(winners) == 1
        assert rows.get(job.id) == winners[0]


# Idempotency


def test_the_same_key_gives_the_same_job_whatever_became_of_it(rows):
    first, new = insert(rows, idempotency_key="k", fingerprint="f")
    ended = end(rows, first, JobState.COMPLETED)

    again, new_again = insert(rows, idempotency_key="k", fingerprint="f")

    assert (new, new_again) == (True, False)
    assert again == ended


def test_the_same_key_for_another_request_is_a_conflict(rows):
    first = submit(rows, idempotency_key="k", fingerprint="f")

    with pytest.raises(IdempotencyConflict):
        submit(rows, idempotency_key="k", fingerprint="g")

    assert ids(rows.page(None)) == [first.id]


def test_a_key_is_its_owners_and_no_key_is_nobodys(rows):
    submit(rows, idempotency_key="k", fingerprint="f")

    assert insert(rows, owner="bob", idempotency_key="k", fingerprint="g")[1]
    assert insert(rows)[1]
    assert insert(rows)[1]


def test_the_same_key_from_two_threads_at_once_makes_one_job(rows, other_rows):
    together = threading.Barrier(2)

    def race(table: Rows) -> list[tuple[JobRow, bool]]:
        made = []
        for number in range(50):
            together.wait()
            made.append(insert(table, idempotency_key=f"k{number}", fingerprint="f"))
        return made

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(race, rows), pool.submit(race, other_rows)

    for (row, new), (same, also_new) in zip(one.result(), other.result(), strict=True):
        assert row.id == same.id
        assert new is not also_new


def test_a_key_whose_job_is_withdrawn_meanwhile_makes_a_new_job(rows, other_rows, database):
    first = submit(rows, idempotency_key="k", fingerprint="f")

    def withdraw(*_: Any) -> None:
        other_rows.withdraw(first)

    with before_the_first(database, "SELECT", withdraw):
        second, new = insert(rows, idempotency_key="k", fingerprint="f")

    assert new
    assert second.id != first.id


@contextmanager
def before_the_first(database: Engine, word: str, act: Callable[..., None]) -> Iterator[None]:
    """Act once, right before a statement of that kind is sent."""
    done: list[bool] = []

    def listen(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(word) and not done:
            done.append(True)
            act()

    event.listen(database, "before_cursor_execute", listen)
    try:
        yield
    finally:
        event.remove(database, "before_cursor_execute", listen)
    assert done


# Withdrawing


def test_a_withdrawn_job_is_seen_by_the_reconciler_alone_and_leaves_no_trace(rows):
    row = submit(rows, idempotency_key="k", fingerprint="f")

    assert rows.withdraw(row) is True

    assert rows.get(row.id) is None
    assert rows.page(None) == []
    assert insert(rows, idempotency_key="k", fingerprint="g")[1]
    (due,) = rows.due(10)
    assert (due.id, due.withdrawn, due.status) == (row.id, True, JobState.CANCELLED)
    assert list(rows.get_all([row.id])) == [row.id]
    rows.remove(row.id)
    assert rows.get_all([row.id]) == {}


def test_a_job_that_runs_can_no_longer_be_withdrawn(rows):
    row = begin(rows, submit(rows))

    assert rows.withdraw(row) is False
    assert rows.get(row.id) == row


def test_a_job_that_a_repeated_request_was_told_of_can_no_longer_be_withdrawn(rows, other_rows):
    row = submit(rows, idempotency_key="k", fingerprint="f")

    told, _ = insert(other_rows, idempotency_key="k", fingerprint="f")

    assert told.id == row.id
    assert rows.withdraw(row) is False
    assert rows.get(row.id).status is JobState.QUEUED


def test_only_a_withdrawn_job_can_be_removed(rows):
    row = submit(rows)

    rows.remove(row.id)

    assert rows.get(row.id) == row


# Moves between regions


def test_what_may_leave_a_region_moves_as_the_next_attempt_and_is_due_there(rows, database):
    waits, retried = submit(rows), begin(rows, submit(rows))
    rows.next_attempt(retried.id, attempt=1)
    others = [
        submit(rows, allow_cross_region=False),
        submit(rows, region="asia-south"),
        submit(rows, type=JobType.WHISPER),
        submit(rows, model="m"),
        begin(rows, submit(rows)),
        end(rows, submit(rows), JobState.CANCELLED),
    ]
    rows.sent([(waits.id, 1), (retried.id, 2)], epoch="e")

    moved = rows.move("asia-east", JobType.LLM, None, to="europe-west", limit=10)

    assert set(ids(moved)) == {waits.id, retried.id}
    waits, retried = rows.get(waits.id), rows.get(retried.id)
    # A move is no lost worker.
    assert (waits.status, waits.region, waits.attempt, waits.losses) == (JobState.QUEUED, "europe-west", 2, 0)
    assert (retried.status, retried.region, retried.attempt, retried.losses) == (JobState.RUNNING, "europe-west", 3, 1)
    assert {waits.id, retried.id} <= set(ids(rows.due(10)))
    assert [rows.get(row.id) for row in others] == others
    assert rows.begun(waits.id, attempt=1, worker_id="left behind", started_at=None) is None
    assert ids(rows.move("asia-east", JobType.LLM, "m", to="europe-west", limit=10)) == [others[3].id]


def test_what_runs_moves_only_if_that_is_asked_for(rows):
    waits, runs = submit(rows), begin(rows, submit(rows))

    moved = rows.move("asia-east", JobType.LLM, None, to="europe-west", running=True, limit=10)

    assert ids(moved) == [runs.id]
    assert (moved[0].status, moved[0].attempt, moved[0].worker_id) == (JobState.RUNNING, 2, None)
    assert rows.get(waits.id) == waits


def test_of_two_that_move_the_same_jobs_each_job_moves_once(rows, other_rows):
    sent = [submit(rows) for _ in range(200)]

    with ThreadPoolExecutor(2) as pool:
        moves = [
            pool.submit(lambda by=by: by.move("asia-east", JobType.LLM, None, to="europe-west", limit=150))
            for by in (rows, other_rows)
        ]
        moved = [job_id for move in moves for job_id in ids(move.result())]
    moved += ids(rows.move("asia-east", JobType.LLM, None, to="europe-west", limit=500))

    assert sorted(moved) == sorted(ids(sent))
    assert {row.attempt for row in rows.get_all(moved).values()} == {2}


def test_a_job_that_its_client_brought_to_a_worker_stays_with_it(rows):
    direct = DirectJob("ann", JobType.LLM, None, None, 0, "asia-east", None, True, 60.0)
    assert rows.adopt(str(uuid.uuid4()), direct, worker_id="w1", started_at=None) is not None

    assert rows.move("asia-east", JobType.LLM, None, to="europe-west", limit=10) == []
    assert rows.move("asia-east", JobType.LLM, None, to="europe-west", running=True, limit=10) == []


def test_a_job_given_back_waits_again_and_its_time_stands_still(rows, database):
    row = begin(rows, submit(rows))
    rows.sent([(row.id, 1)], epoch="e")
    assert rows.given_back(dataclasses.replace(row, version=1)) is None

    again = rows.given_back(row)

    assert (again.status, again.attempt, again.worker_id) == (JobState.RUNNING, 1, None)
    assert column(database, row, "run_deadline") is None
    assert ids(rows.due(10)) == [row.id]
    assert begin(rows, again).worker_id == "w1"


def test_an_attempt_that_no_worker_is_to_blame_for_is_no_loss(rows):
    row = submit(rows)

    assert rows.next_attempt(row.id, attempt=1, lost=False).losses == 0
    assert rows.next_attempt(row.id, attempt=2).losses == 1


def test_live_jobs_are_counted_by_region_and_the_oldest_that_waits_is_known(rows, database):
    old = submit(rows)
    submit(rows)
    begin(rows, submit(rows, type=JobType.WHISPER, model="m"))
    submit(rows, region="asia-south", allow_cross_region=False)
    end(rows, submit(rows, region="gone"), JobState.COMPLETED)
    age(database, old, 100, "created_at")

    assert rows.census.live("asia-east") == {(JobType.LLM, JobState.QUEUED): 2, (JobType.WHISPER, JobState.RUNNING): 1}
    assert set(rows.census.regions()) == {"asia-east", "asia-south"}
    assert set(rows.census.movable("asia-east")) == {(JobType.LLM, None), (JobType.WHISPER, "m")}
    assert rows.census.movable("asia-south") == []
    waits = rows.census.oldest_waits(["asia-east", "asia-south", "gone"])
    assert waits.keys() == {("asia-east", JobType.LLM), ("asia-south", JobType.LLM)}
    assert waits["asia-east", JobType.LLM] == pytest.approx(100, abs=5)
    assert 0 <= waits["asia-south", JobType.LLM] < 5


# The outbox


def test_a_job_that_nobody_proved_to_be_sent_comes_due(rows, database):
    row = submit(rows)
    assert rows.due(10) == []

    age(database, row, UNPROVEN_S, "due_at")

    assert ids(rows.due(10)) == [row.id]


def test_a_sent_job_is_not_due_until_it_is_to_be_sent_again(rows):
    row = submit(rows)
    rows.send_again(row.id)
    assert ids(rows.due(10)) == [row.id]

    rows.sent([(row.id, 1)], epoch="e")

    assert rows.due(10) == []
    assert rows.get(row.id).sends == 1
    assert rows.send_again(row.id).version == 3
    assert ids(rows.due(10)) == [row.id]


def test_the_next_attempt_has_its_whole_time_and_the_job_keeps_its_start(rows, database):
    row = begin(rows, submit(rows, timeout_seconds=100))
    age(database, row, 1000, "run_deadline")
    assert [late.id for late in rows.ran_too_long(10)] == [row.id]

    rows.next_attempt(row.id, attempt=1)
    assert rows.ran_too_long(10) == []
    again = rows.begun(row.id, attempt=2, worker_id="w2", started_at=time.time() + 5)

    assert (again.status, again.worker_id, again.started_at) == (JobState.RUNNING, "w2", row.started_at)
    assert rows.ran_too_long(10) == []
    age(database, row, 1000, "run_deadline")
    assert [late.id for late in rows.ran_too_long(10)] == [row.id]
    assert rows.begun(row.id, attempt=2, worker_id="w2", started_at=None) is None


def test_a_mark_of_an_attempt_that_was_lost_meanwhile_marks_nothing(rows, database):
    one, other = submit(rows), submit(rows)
    rows.next_attempt(one.id, attempt=1)

    rows.sent([(one.id, 1), (other.id, 1)], epoch="e")

    assert ids(rows.due(10)) == [one.id]
    assert [rows.get(row.id).sends for row in (one, other)] == [0, 1]
    rows.sent([(one.id, 2)], epoch="e")
    assert rows.due(10) == []


def test_a_mark_comes_too_late_for_a_job_that_was_cancelled(rows):
    row = submit(rows)
    rows.cancel(row.id)

    rows.sent([(row.id, 1)], epoch="e")

    assert ids(rows.due(10)) == [row.id]


def test_the_ledger_is_not_told_of_a_job_that_is_alive(rows):
    row = submit(rows)
    rows.send_again(row.id)

    rows.told(row.id)

    assert ids(rows.due(10)) == [row.id]


def test_the_most_urgent_is_due_first_and_the_oldest_of_equals(rows, database):
    made = [submit(rows, priority=priority) for priority in (0, 5, 0, 9, 5)]
    for position, row in enumerate(made):
        rows.send_again(row.id)
        age(database, row, 100 - position, "created_at")

    assert ids(rows.due(10)) == [made[number].id for number in (3, 1, 4, 0, 2)]
    assert ids(rows.due(2)) == [made[3].id, made[1].id]


def test_what_is_due_in_postponed_regions_comes_due_later(rows, database):
    one, other = submit(rows), submit(rows, region="europe-west")
    for row in (one, other):
        rows.send_again(row.id)

    rows.postpone([one.region], 30)

    assert ids(rows.due(10)) == [other.id]
    age(database, one, 30, "due_at")
    assert set(ids(rows.due(10))) == {one.id, other.id}


def test_unsent_jobs_are_live_ones_of_the_region_whose_send_is_not_proven(rows):
    sent, _, cancelled, _ = submit(rows), submit(rows), submit(rows), submit(rows, region="europe-west")
    rows.sent([(sent.id, sent.attempt)], epoch="e")
    rows.cancel(cancelled.id)

    assert rows.census.unsent("asia-east", 10) == 1
    submit(rows)
    assert [rows.census.unsent("asia-east", most) for most in (1, 2, 10)] == [1, 2, 2]


def test_nothing_is_postponed_or_sent_by_an_empty_list(rows):
    row = submit(rows)
    rows.send_again(row.id)

    rows.postpone([], 30)
    rows.sent([], epoch="e")

    assert ids(rows.due(10)) == [row.id]
    assert rows.get_all([]) == {}


# What the reconciler looks for


def test_a_job_waits_no_longer_than_its_queue_deadline(rows, database):
    late, patient, running, ended = (submit(rows, queue_timeout_seconds=60) for _ in range(4))
    submit(rows)
    begin(rows, running)
    end(rows, ended, JobState.CANCELLED)
    assert rows.waited_too_long(10) == []

    for row in (late, running, ended):
        age(database, row, 60, "queue_deadline")
    age(database, patient, 30, "queue_deadline")

    assert ids(rows.waited_too_long(10)) == [late.id]


def test_a_job_runs_no_longer_than_its_time_and_a_grace(rows, database):
    def started(seconds_ago: float) -> JobRow:
        row = submit(rows, timeout_seconds=60)
        age(database, row, 1000, "created_at")
        return begin(rows, row, row.created_at - seconds_ago)

    late = started(60 + RUN_GRACE_S + 1)
    started(60 + RUN_GRACE_S - 5)
    end(rows, started(60 + RUN_GRACE_S + 1), JobState.COMPLETED)
    submit(rows)

    assert ids(rows.ran_too_long(10)) == [late.id]


def test_jobs_of_an_earlier_life_of_their_store_are_found(rows):
    old, running, current, unsent, elsewhere, due, ended = (
        submit(rows, region="asia-south" if number == 4 else "asia-east") for number in range(7)
    )
    rows.sent([(row.id, 1) for row in (old, running, elsewhere, due, ended)], epoch="m")
    rows.sent([(current.id, 1)], epoch="n")
    begin(rows, running)
    rows.send_again(due.id)
    end(rows, ended, JobState.COMPLETED)
    assert unsent.sends == 0

    for epoch in ("a", "z"):
        assert set(ids(rows.of_other_epochs("asia-east", epoch, 10))) == {old.id, running.id, current.id}
    assert set(ids(rows.of_other_epochs("asia-east", "n", 10))) == {old.id, running.id}
    assert ids(rows.of_other_epochs("asia-east", "m", 10)) == [current.id]


def test_a_sent_job_that_nobody_begins_is_looked_at_ever_more_rarely(rows, database):
    row = submit(rows)

    def seems_lost(seconds: float) -> bool:
        age(database, row, seconds, "sent_at")
        found = rows.long_unbegun("asia-east", JobType.LLM, None, first_s=10, most_s=100, limit=10)
        age(database, row, -seconds, "sent_at")
        return ids(found) == [row.id]

    for sends, wait_s in ((1, 10), (2, 40), (3, 90), (4, 100), (5, 100)):
        rows.sent([(row.id, 1)], epoch="e")
        assert rows.get(row.id).sends == sends
        assert not seems_lost(wait_s - 5)
        assert seems_lost(wait_s + 1)


def test_a_later_attempt_that_nobody_begins_seems_lost_as_soon_as_a_first_one(rows, database):
    row = submit(rows)
    for _ in range(3):
        rows.sent([(row.id, 1)], epoch="e")
    begin(rows, row)
    rows.next_attempt(row.id, attempt=1)
    rows.sent([(row.id, 2)], epoch="e")

    age(database, row, 11, "sent_at")

    assert rows.get(row.id).status is JobState.RUNNING
    assert ids(rows.long_unbegun("asia-east", JobType.LLM, None, first_s=10, most_s=100, limit=10)) == [row.id]


def test_only_waiting_jobs_of_the_region_and_type_can_seem_lost_oldest_first(rows, database):
    made = [
        submit(rows),
        submit(rows),
        submit(rows, region="asia-south"),
        submit(rows, type=JobType.WHISPER),
        submit(rows),
        submit(rows),
    ]
    rows.sent([(row.id, 1) for row in made], epoch="e")
    for position, row in enumerate(made):
        age(database, row, 50 + position, "sent_at")
    begin(rows, made[4])
    rows.send_again(made[5].id)

    def lost(limit: int) -> list[str]:
        return ids(rows.long_unbegun("asia-east", JobType.LLM, None, first_s=10, most_s=100, limit=limit))

    assert lost(10) == [made[1].id, made[0].id]
    assert lost(1) == [made[1].id]


def test_one_holder_leads_until_it_no_longer_says_so(rows, other_rows, database):
    assert rows.leadership.take("a", 60)
    assert rows.leadership.take("a", 60)
    assert not other_rows.leadership.take("b", 60)

    with database.connect() as connection:
        connection.execute(text("UPDATE leadership SET until = until - 60"))

    assert other_rows.leadership.take("b", 60)
    assert not rows.leadership.take("a", 60)


def test_of_many_that_want_to_lead_at_once_one_does(rows, other_rows):
    together = threading.Barrier(8)

    def want(number: int) -> bool:
        together.wait()
        return (rows, other_rows)[number % 2].leadership.take(f"control {number}", 5)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(want, range(8))) == 1


# Pages


def test_pages_follow_one_another_even_where_jobs_were_made_at_the_same_moment(rows, database):
    made = [submit(rows) for _ in range(9)]
    with database.connect() as connection:
        for position, row in enumerate(made):
            at = 1000.5 + position // 4
            connection.execute(text("UPDATE jobs SET created_at = :at WHERE id = :id"), {"at": at, "id": row.id})

    seen: list[JobRow] = []
    while page := rows.page("ann", limit=2, before=(seen[-1].created_at, seen[-1].id) if seen else None):
        seen += page
        # What is made meanwhile is newer, and moves nothing.
        submit(rows)

    newest_first = sorted(made, key=lambda row: (made.index(row) // 4, row.id), reverse=True)
    assert ids(seen) == ids(newest_first)


def test_pages_show_what_was_asked_for(rows, database):
    old = submit(rows)
    age(database, old, 100, "created_at")
    done = end(rows, submit(rows, type=JobType.WHISPER), JobState.COMPLETED)
    bobs = submit(rows, owner="bob", region="asia-south")

    def found(owner: str | None = None, **wanted: Any) -> set[str]:
        return set(ids(rows.page(owner, **wanted)))

    assert ids(rows.page(None))[-1] == old.id
    assert found() == {old.id, done.id, bobs.id}
    assert found("ann") == {old.id, done.id}
    assert found(status=JobState.COMPLETED) == {done.id}
    assert found(type=JobType.WHISPER) == {done.id}
    assert found(region="asia-south") == {bobs.id, done.id}
    assert found("bob", type=JobType.WHISPER) == set()
    assert found(created_after=bobs.created_at - 50) == {done.id, bobs.id}


# What it costs: the same with a hundred thousand jobs as with ten


@dataclass(frozen=True)
class Look:
    """One way to ask for jobs, and the column by which the database must go straight to the rows it wants."""

    ask: Callable[[Rows], object]
    by: str


LOOKS = {
    "get": Look(lambda rows: rows.get("x"), "id"),
    "get_all": Look(lambda rows: rows.get_all(["x", "y"]), "id"),
    "due": Look(lambda rows: rows.due(10), "due_at"),
    "waited_too_long": Look(lambda rows: rows.waited_too_long(10), "queue_deadline"),
    "ran_too_long": Look(lambda rows: rows.ran_too_long(10), "run_deadline"),
    "of_other_epochs": Look(lambda rows: rows.of_other_epochs("asia-east", "e", 10), "store_epoch"),
    "long_unbegun": Look(
        lambda rows: rows.long_unbegun("asia-east", JobType.LLM, None, first_s=1, most_s=9, limit=10), "type"
    ),
    "oldest_waits": Look(lambda rows: rows.census.oldest_waits(["asia-east"]), "type"),
    "page of an owner": Look(lambda rows: rows.page("owner-1"), "owner"),
    "page after another": Look(lambda rows: rows.page(None, before=(100.0, "x")), "created_at"),
    "owner's page after another": Look(lambda rows: rows.page("owner-1", before=(100.0, "x")), "created_at"),
}


@pytest.fixture(scope="module")
def full_postgres(migrated_postgres: str, postgres: Any) -> Iterator[Engine]:
    """A PostgreSQL database with 10,000 ended and 10,000 live jobs, of which few are late, and with statistics."""
    engine = open_database(postgres.create("full", "migrated"))
    fill = """
        INSERT INTO jobs (id, owner, type, params, priority, region, allow_cross_region, timeout_seconds, status,
                          attempt, version, created_at, completed_at, queue_deadline, run_deadline, due_at, store_epoch,
                          sent_at, sends, withdrawn)
        SELECT 'job-' || n, 'owner-' || n % 50, (ARRAY['llm', 'vision', 'whisper'])[1 + n / 2 % 3], '{}', n % 10,
               (ARRAY['asia-east', 'asia-south'])[1 + n / 2 % 2], true, 60,
               CASE n % 4 WHEN 0 THEN 'queued' WHEN 2 THEN 'running' ELSE 'completed' END,
               1, 3, n, n, 1e10 + n, CASE WHEN n % 4 = 2 THEN 1e10 + n END,
               CASE WHEN n % 4 = 0 THEN 1e10 END, 'e', 1e9 + n, 1, false
        FROM generate_series(1, 20000) AS n
    """
    with engine.connect() as connection:
        connection.execute(text(fill))
        connection.execute(text("ANALYZE jobs"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_sqlite_searches_by_index(database_url, look):
    engine = open_database(database_url)

    plan = [step.detail for step in explained(engine, look, "EXPLAIN QUERY PLAN")]

    engine.dispose()
    read = [step for step in plan if " jobs" in step]
    assert read
    assert all(step.startswith("SEARCH jobs USING") and look.by in step.partition("(")[2] for step in read), plan


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_postgresql_searches_by_index(full_postgres, look):
    plan = [step[0] for step in explained(full_postgres, look, "EXPLAIN")]

    assert not any("Seq Scan" in step for step in plan), plan
    conditions = [step for step in plan if "Index Cond:" in step]
    assert conditions, plan
    assert all(look.by in condition for condition in conditions), plan


def test_a_page_of_everybodys_jobs_is_read_off_an_index_in_its_order(database, full_postgres):
    look = Look(lambda rows: rows.page(None), "created_at")
    if database.dialect.name == "sqlite":
        (step,) = explained(database, look, "EXPLAIN QUERY PLAN")
        assert step.detail == "SCAN jobs USING INDEX newest"
    else:
        plan = "".join(step[0] for step in explained(full_postgres, look, "EXPLAIN"))
        assert "Index Scan Backward using newest" in plan
        assert "Sort" not in plan


def explained(engine: Engine, look: Look, how: str) -> list[Any]:
    """The database's plan for what the look asks it."""
    asked: list[tuple[str, Any]] = []

    def listen(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", listen)
    look.ask(Rows(engine))
    event.remove(engine, "before_cursor_execute", listen)
    ((statement, parameters),) = asked
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(f"{how} {statement}", parameters))
